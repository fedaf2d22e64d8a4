package agl

import (
	"context"
	"errors"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

const (
	renewalsOfALease = 3
	shortestRenewal  = time.Second
)

func (s *LeaseStream) renew() {
	defer s.running.Done()
	for {
		leases, shortest := s.renewable()
		if !pause(s.ctx, shortest/renewalsOfALease) {
			return
		}
		if leases, shortest = s.renewable(); len(leases) == 0 {
			continue
		}
		if err := s.renewOnce(leases, shortest); err != nil && !transient(err) && s.ctx.Err() == nil {
			var known *Error
			if !errors.As(err, &known) || known.Code != codes.DeadlineExceeded {
				s.fail(err)
				return
			}
		}
	}
}

func (s *LeaseStream) renewable() ([]*pb.HeldLease, time.Duration) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	shortest := s.options.Lease
	var leases []*pb.HeldLease
	for _, lease := range s.held {
		leases = append(leases, heldLease(lease))
		if lease.Duration != nil && lease.Duration.AsDuration() < shortest {
			shortest = lease.Duration.AsDuration()
		}
	}
	return leases, shortest
}

func (s *LeaseStream) renewOnce(leases []*pb.HeldLease, shortest time.Duration) error {
	// No longer than until the next is due: within one call the waits between tries grow, and could outlast a lease.
	limit := shortest / renewalsOfALease
	if limit < shortestRenewal {
		limit = shortestRenewal
	}
	ctx, cancel := context.WithTimeout(s.ctx, limit)
	defer cancel()
	request := &pb.RenewLeasesRequest{WorkerId: s.WorkerID, Leases: leases}
	// It goes out the moment the store is back, which has given the leases their own time anew, and no more.
	answer, err := s.client.Runner.RenewLeases(ctx, request, grpc.WaitForReady(true))
	if err != nil {
		return err
	}
	for _, renewal := range answer.Renewals {
		if renewal.Error != nil {
			s.lose(renewal.AttemptId, itemError(renewal.Error))
		}
	}
	s.command(answer.Commands)
	return nil
}

package agl

import (
	"context"
	"errors"
	"io"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

const (
	triesOfARefusedStream = 5
	notPermittedWait      = 5 * time.Second
	resultsTimeout        = 24 * time.Hour
	mostCompletions       = 1000
)

// LeaseOptions say which work a worker takes.
type LeaseOptions struct {
	WorkerID string
	// SessionID is new at each start of a worker (the default): leases of the session that it does not
	// name are released.
	SessionID string
	Queues    []string
	Labels    map[string]string
	// Lease is 1 s to 1 h; default 30 s.
	Lease time.Duration
	// Credits are deliveries allowed at the start; more with Grant.
	Credits int64
}

// LeaseEvent is one of Connected, Disconnected, Delivered, Lost, Commanded and Idle.
type LeaseEvent interface{ leaseEvent() }

// Connected: the stream is open.
type Connected struct{}

// Disconnected: the stream broke; it is opened again.
type Disconnected struct{ Err error }

// Delivered is work.
type Delivered struct{ Work *pb.LeasedRollout }

// Lost is a held lease that is over: stop.
type Lost struct {
	AttemptID string
	Err       error
}

// Commanded is an order of the store, repeated until it is acknowledged.
type Commanded struct{ Command *pb.WorkerCommand }

// Idle tells why nothing comes.
type Idle struct{ Reason string }

func (Connected) leaseEvent()    {}
func (Disconnected) leaseEvent() {}
func (Delivered) leaseEvent()    {}
func (Lost) leaseEvent()         {}
func (Commanded) leaseEvent()    {}
func (Idle) leaseEvent()         {}

// LeaseStream takes work for one worker, and keeps it.
//
// Work comes as long as credits last. A held lease is renewed at a third of its duration, all of a
// worker's in one call, until Complete or Release. A stream that breaks is opened again with the
// leases that are held and the credits that are left. Whether a lease is lost is the store's word
// alone: while the store is away nothing ends.
type LeaseStream struct {
	WorkerID string

	client  *Client
	options LeaseOptions
	ctx     context.Context
	cancel  context.CancelFunc
	running sync.WaitGroup
	events  *queue

	mutex      sync.Mutex
	held       map[string]*pb.Lease
	ending     map[string]bool
	seen       map[int64]bool // commands, and whether they were acknowledged
	outgoing   *queue
	credits    int64
	granted    int64
	drained    *string
	connected  bool
	failure    error
	pending    []pendingCompletion
	completing bool
}

type pendingCompletion struct {
	completion *pb.Completion
	done       chan<- completed
}

type completed struct {
	rollout *pb.Rollout
	err     error
}

// Lease starts taking work. Read Next until it fails; Close hands back what is still held.
func (c *Client) Lease(options LeaseOptions) *LeaseStream {
	if options.SessionID == "" {
		options.SessionID = newID()
	}
	if options.Lease == 0 {
		options.Lease = 30 * time.Second
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &LeaseStream{
		WorkerID: options.WorkerID, client: c, options: options, ctx: ctx, cancel: cancel, events: newQueue(),
		held: map[string]*pb.Lease{}, ending: map[string]bool{}, seen: map[int64]bool{}, credits: options.Credits,
	}
	s.running.Add(2)
	go s.run()
	go s.renew()
	return s
}

// Next waits for the next event; io.EOF after Close.
func (s *LeaseStream) Next(ctx context.Context) (LeaseEvent, error) {
	event, err := s.events.next(ctx)
	if err != nil {
		s.mutex.Lock()
		defer s.mutex.Unlock()
		if err == io.EOF && s.failure != nil {
			return nil, s.failure
		}
		return nil, err
	}
	return event.(LeaseEvent), nil
}

// Held are the leases that are held now, by attempt id.
func (s *LeaseStream) Held() map[string]*pb.Lease {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	held := make(map[string]*pb.Lease, len(s.held))
	for id, lease := range s.held {
		held[id] = lease
	}
	return held
}

// Grant allows so many more deliveries.
func (s *LeaseStream) Grant(credits int64) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.credits += credits
	s.granted += credits
	s.send(&pb.StreamLeasesRequest{Message: &pb.StreamLeasesRequest_Credit{Credit: &pb.CreditGrant{Granted: s.granted}}})
}

// Acknowledge says that a command was carried out; the store stops repeating it.
func (s *LeaseStream) Acknowledge(command *pb.WorkerCommand) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.seen[command.CommandId] = true
	s.send(&pb.StreamLeasesRequest{Message: &pb.StreamLeasesRequest_Ack{Ack: &pb.CommandAck{CommandIds: []int64{command.CommandId}}}})
}

// Drain takes nothing new: credits that are left are void. What is held goes on.
func (s *LeaseStream) Drain(reason string) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.drained, s.credits = &reason, 0
	s.send(&pb.StreamLeasesRequest{Message: &pb.StreamLeasesRequest_Drain{Drain: &pb.LeaseStreamDrain{Reason: reason}}})
}

// Complete ends a held attempt; completions made while a call is under way travel together in the
// next. Of the completion the lease's ids and token are filled in. It fails with LeaseLost when the
// lease is over: the result was not taken. Results wait for a store that is away.
func (s *LeaseStream) Complete(lease *pb.Lease, completion *pb.Completion) (*pb.Rollout, error) {
	completion.RolloutId, completion.AttemptId, completion.LeaseToken = lease.RolloutId, lease.AttemptId, lease.LeaseToken
	var rollout *pb.Rollout
	err := s.end([]string{lease.AttemptId}, func() error {
		done := make(chan completed, 1)
		s.submit(pendingCompletion{completion, done})
		answer := <-done
		rollout = answer.rollout
		return answer.err
	})
	return rollout, err
}

// Release hands attempts back unfinished; it answers for each why it was refused, nil = done.
func (s *LeaseStream) Release(ctx context.Context, reason string, leases ...*pb.Lease) ([]error, error) {
	if len(leases) == 0 {
		return nil, nil
	}
	request := &pb.ReleaseAttemptsRequest{WorkerId: s.WorkerID, Reason: reason}
	var ids []string
	for _, lease := range leases {
		ids = append(ids, lease.AttemptId)
		request.Leases = append(request.Leases, heldLease(lease))
	}
	var outcomes []error
	err := s.end(ids, func() error {
		answer, err := s.client.Runner.ReleaseAttempts(ctx, request)
		for _, result := range answer.GetResults() {
			outcomes = append(outcomes, itemError(result.Error))
		}
		return err
	})
	return outcomes, err
}

// Close ends the stream, handing back what is still held.
func (s *LeaseStream) Close(ctx context.Context) error {
	s.cancel()
	s.running.Wait()
	held := s.Held()
	leases := make([]*pb.Lease, 0, len(held))
	for _, lease := range held {
		leases = append(leases, lease)
	}
	_, err := s.Release(ctx, "the worker left", leases...)
	s.events.close()
	return err
}

func (s *LeaseStream) end(ids []string, call func() error) error {
	// A renewal that crosses the call finds the lease over: that is no loss.
	s.mark(ids, true)
	defer s.mark(ids, false)
	err := call()
	if err == nil || errors.Is(err, LeaseLost) || errors.Is(err, EntityNotFound) || errors.Is(err, IllegalTransition) {
		s.mutex.Lock()
		defer s.mutex.Unlock()
		for _, id := range ids {
			delete(s.held, id)
		}
	}
	return err
}

func (s *LeaseStream) mark(ids []string, ending bool) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for _, id := range ids {
		if ending {
			s.ending[id] = true
		} else {
			delete(s.ending, id)
		}
	}
}

func (s *LeaseStream) submit(one pendingCompletion) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.pending = append(s.pending, one)
	if !s.completing {
		s.completing = true
		go s.completePending()
	}
}

func (s *LeaseStream) completePending() {
	for {
		s.mutex.Lock()
		batch := s.pending
		if len(batch) > mostCompletions {
			batch = batch[:mostCompletions]
		}
		s.pending = s.pending[len(batch):]
		s.completing = len(batch) > 0
		s.mutex.Unlock()
		if len(batch) == 0 {
			return
		}
		s.completeBatch(batch)
	}
}

func (s *LeaseStream) completeBatch(batch []pendingCompletion) {
	ctx, cancel := context.WithTimeout(context.Background(), resultsTimeout)
	defer cancel()
	request := &pb.CompleteAttemptsRequest{WorkerId: s.WorkerID}
	for _, one := range batch {
		request.Completions = append(request.Completions, one.completion)
	}
	answer, err := s.client.Runner.CompleteAttempts(ctx, request)
	for index, one := range batch {
		if err != nil {
			one.done <- completed{err: err}
			continue
		}
		result := answer.Results[index]
		one.done <- completed{result.Rollout, itemError(result.Error)}
	}
}

func (s *LeaseStream) run() {
	defer s.running.Done()
	tries, refusals := 0, 0
	for s.ctx.Err() == nil {
		err := s.session()
		if s.ctx.Err() != nil {
			return
		}
		connected := s.disconnect(err)
		tries++
		if connected {
			tries = 0
		}
		var known *Error
		switch {
		case err == io.EOF:
		case errors.As(err, &known) && known.Code == codes.PermissionDenied:
			// A grant may come or come back: wait for it, and say so.
			s.events.push(Idle{"not permitted: " + known.Message})
			pause(s.ctx, notPermittedWait)
			continue
		case transient(err) || connected:
			refusals = 0
		default:
			refusals++
		}
		if refusals >= triesOfARefusedStream {
			s.fail(err)
			return
		}
		s.client.retry.again(s.ctx, err, tries)
	}
}

func (s *LeaseStream) fail(err error) {
	s.mutex.Lock()
	if s.failure == nil {
		s.failure = err
	}
	s.mutex.Unlock()
	s.cancel()
	s.events.close()
}

func (s *LeaseStream) disconnect(err error) bool {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	was := s.connected
	s.connected = false
	if was {
		s.events.push(Disconnected{err})
	}
	return was
}

func (s *LeaseStream) session() error {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	stream, err := s.client.Runner.StreamLeases(ctx)
	if err != nil {
		return err
	}
	outgoing := s.open()
	defer outgoing.close()
	go func() {
		for {
			message, err := outgoing.next(ctx)
			if err != nil || stream.Send(message.(*pb.StreamLeasesRequest)) != nil {
				return // the reader of the same call learns its status
			}
		}
	}()
	for {
		response, err := stream.Recv()
		if err != nil {
			return err
		}
		s.receive(response)
	}
}

func (s *LeaseStream) open() *queue {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.outgoing, s.granted = newQueue(), s.credits
	opening := &pb.LeaseStreamOpen{
		WorkerId: s.WorkerID, SessionId: s.options.SessionID, Granted: s.granted,
		Work: &pb.WorkRequest{RunId: s.client.run, Queues: s.options.Queues, LeaseDuration: durationpb.New(s.options.Lease)},
	}
	for key, value := range s.options.Labels {
		opening.Work.Labels = append(opening.Work.Labels, &pb.Label{Key: key, Value: value})
	}
	for _, lease := range s.held {
		opening.Held = append(opening.Held, heldLease(lease))
	}
	s.send(&pb.StreamLeasesRequest{Message: &pb.StreamLeasesRequest_Open{Open: opening}})
	if s.drained != nil {
		s.send(&pb.StreamLeasesRequest{Message: &pb.StreamLeasesRequest_Drain{Drain: &pb.LeaseStreamDrain{Reason: *s.drained}}})
	}
	return s.outgoing
}

func (s *LeaseStream) send(message *pb.StreamLeasesRequest) {
	if s.outgoing != nil {
		s.outgoing.push(message)
	}
}

func (s *LeaseStream) receive(response *pb.StreamLeasesResponse) {
	switch message := response.Message.(type) {
	case *pb.StreamLeasesResponse_Opened:
		s.mutex.Lock()
		s.connected = true
		s.mutex.Unlock()
		s.events.push(Connected{})
		for _, id := range message.Opened.LostAttemptIds {
			s.lose(id, nil)
		}
	case *pb.StreamLeasesResponse_Delivery:
		for _, work := range message.Delivery.Rollouts {
			s.deliver(work)
		}
	case *pb.StreamLeasesResponse_Commands:
		s.command(message.Commands.Commands)
	case *pb.StreamLeasesResponse_Idle:
		s.events.push(Idle{message.Idle.Reason})
	}
}

func (s *LeaseStream) deliver(work *pb.LeasedRollout) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.credits > 0 {
		s.credits--
	}
	s.held[work.GetLease().GetAttemptId()] = work.Lease
	s.events.push(Delivered{work})
}

func (s *LeaseStream) lose(id string, err error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if _, held := s.held[id]; !held || s.ending[id] {
		return
	}
	delete(s.held, id)
	s.events.push(Lost{id, err})
}

func (s *LeaseStream) command(commands []*pb.WorkerCommand) {
	for _, command := range commands {
		s.mutex.Lock()
		acknowledged, seen := s.seen[command.CommandId]
		if !seen {
			s.seen[command.CommandId] = false
		}
		s.mutex.Unlock()
		switch {
		case acknowledged: // that answer was lost with a stream
			s.Acknowledge(command)
		case !seen:
			s.events.push(Commanded{command})
		}
	}
}

func heldLease(lease *pb.Lease) *pb.HeldLease {
	return &pb.HeldLease{AttemptId: lease.AttemptId, LeaseToken: lease.LeaseToken}
}

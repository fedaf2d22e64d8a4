// Command measure measures the client against a store, for benchmarks/bench_clients.py:
// measure HOST:PORT SPANS ROUNDS.
//
// It prints one JSON object: spans on disk a second, sent in groups of 100 with 64 groups under way, and
// the milliseconds of each round trip of a lease, from the credit to the completion on disk.
package main

import (
	"context"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"os"
	"strconv"
	"time"

	agl "github.com/agl-grpc/agl-grpc/clients/go"
	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

const (
	group    = 100
	underWay = 64
	warmUp   = 50
)

func main() {
	if len(os.Args) != 4 {
		log.Fatal("usage: measure HOST:PORT SPANS ROUNDS")
	}
	spans, err := strconv.Atoi(os.Args[2])
	if err != nil {
		log.Fatal(err)
	}
	rounds, err := strconv.Atoi(os.Args[3])
	if err != nil {
		log.Fatal(err)
	}
	client, err := agl.Dial(os.Args[1])
	if err != nil {
		log.Fatal(err)
	}
	defer client.Close()
	rate, err := spansPerSecond(client, spans)
	if err != nil {
		log.Fatal(err)
	}
	trips, err := roundTrips(client, rounds)
	if err != nil {
		log.Fatal(err)
	}
	text, err := json.Marshal(map[string]interface{}{"spans_per_second": rate, "round_trips_ms": trips})
	if err != nil {
		log.Fatal(err)
	}
	fmt.Println(string(text))
}

func groupOf(at *pb.AttemptedRollout, first int) (*pb.AttemptSpans, error) {
	made := &pb.AttemptSpans{RolloutId: at.Rollout.RolloutId, AttemptId: at.Attempt.AttemptId}
	for number := first; number < first+group; number++ {
		id := make([]byte, 8)
		binary.BigEndian.PutUint64(id, uint64(number))
		entries, err := agl.Values{"number": number, "text": "the quick brown fox"}.KeyValues()
		if err != nil {
			return nil, err
		}
		made.Spans = append(made.Spans, &pb.Span{
			TraceId: []byte("0123456789abcdef"), SpanId: id, Name: "step", Attributes: entries,
			StartTimeUnixNano: 1_700_000_000_000_000_000 + uint64(number), EndTimeUnixNano: 1_700_000_000_000_001_000 + uint64(number),
		})
	}
	return made, nil
}

func spansPerSecond(client *agl.Client, count int) (float64, error) {
	ctx := context.Background()
	started, err := client.Store.StartRollout(ctx, &pb.StartRolloutRequest{Rollout: &pb.RolloutSpec{}})
	if err != nil {
		return 0, err
	}
	streamer := client.Spans("")
	send := func(first int) error {
		made, err := groupOf(started.Rollout, first)
		if err != nil {
			return err
		}
		ack, err := streamer.Send(ctx, made)
		if err == nil && len(ack.Rejected) > 0 {
			err = ack.Rejected[0].Err
		}
		return err
	}
	if err := send(1); err != nil {
		return 0, err
	}
	slots, outcomes := make(chan struct{}, underWay), make(chan error, count/group+1)
	begun, groups := time.Now(), 0
	for first := 1 + group; first <= count; first += group {
		slots <- struct{}{}
		groups++
		go func(first int) {
			outcomes <- send(first)
			<-slots
		}(first)
	}
	for ; groups > 0; groups-- {
		if err := <-outcomes; err != nil {
			return 0, err
		}
	}
	rate := float64(count-group) / time.Since(begun).Seconds()
	return rate, streamer.Close(ctx)
}

func roundTrips(client *agl.Client, count int) ([]float64, error) {
	ctx := context.Background()
	specs := make([]*pb.RolloutSpec, count+warmUp)
	for index := range specs {
		specs[index] = &pb.RolloutSpec{}
	}
	if _, err := client.Enqueue(ctx, specs...); err != nil {
		return nil, err
	}
	stream := client.Lease(agl.LeaseOptions{WorkerID: "measure-go"})
	var found []float64
	for round := 0; round < count+warmUp; round++ {
		begun := time.Now()
		stream.Grant(1)
		if err := complete(ctx, stream); err != nil {
			return nil, err
		}
		if round >= warmUp {
			found = append(found, float64(time.Since(begun).Nanoseconds())/1e6)
		}
	}
	return found, stream.Close(ctx)
}

func complete(ctx context.Context, stream *agl.LeaseStream) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	for {
		event, err := stream.Next(ctx)
		if err != nil {
			return err
		}
		if work, ok := event.(agl.Delivered); ok {
			_, err := stream.Complete(work.Work.Lease, &pb.Completion{Status: pb.AttemptStatus_ATTEMPT_STATUS_SUCCEEDED})
			return err
		}
		if lost, ok := event.(agl.Lost); ok {
			return errors.New("a lease was lost: " + lost.AttemptID)
		}
	}
}

package agl

import (
	"context"
	"errors"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

func TestSpansAreAcknowledgedAndBadOnesNamed(t *testing.T) {
	client := startStore(t).client()
	rollout, attempt := startAttempt(t, client)
	spans := client.Spans("")
	large := newSpan("large")
	large.Attributes, _ = Values{"x": strings.Repeat("x", 5<<20)}.KeyValues()
	early := newSpan("early") // of a clock that is a day and more ahead
	early.StartTimeUnixNano += uint64(25 * time.Hour)
	early.EndTimeUnixNano += uint64(25 * time.Hour)
	group := func(spans ...*pb.Span) *pb.AttemptSpans {
		return &pb.AttemptSpans{RolloutId: rollout, AttemptId: attempt, Spans: spans}
	}
	ack, err := spans.Send(within(t, 20*time.Second), group(newSpan("a"), newSpan(""), large, early), group(newSpan("c")))
	if err != nil || ack.Durability != pb.Durability_DURABILITY_DISK || len(ack.Rejected) != 3 {
		t.Fatalf("got %v %v", ack, err)
	}
	for _, rejected := range ack.Rejected {
		if rejected.Group != 0 || rejected.Index < 1 || !errors.Is(rejected.Err, InvalidField) {
			t.Errorf("got %v", rejected)
		}
	}
	if err := spans.Close(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	if found := storedNames(t, client, rollout); len(found) != 2 || found["a"] != 1 || found["c"] != 1 {
		t.Errorf("stored %v", found)
	}
}

func TestNoSpanIsLostOrDoubledWhenTheStoreIsKilled(t *testing.T) {
	store := startStore(t)
	client := store.client()
	rollout, attempt := startAttempt(t, client)
	spans := client.Spans("")
	var senders sync.WaitGroup
	all := names(3000)
	work := make(chan string)
	for n := 0; n < 20; n++ {
		senders.Add(1)
		go func() {
			defer senders.Done()
			for name := range work {
				if _, err := spans.Send(context.Background(), &pb.AttemptSpans{RolloutId: rollout, AttemptId: attempt, Spans: []*pb.Span{newSpan(name)}}); err != nil {
					t.Error(err)
				}
			}
		}()
	}
	for n, name := range all {
		if n == 800 || n == 1600 || n == 2400 {
			store.down(syscall.SIGKILL)
			store.up()
		}
		work <- name.(string)
	}
	close(work)
	senders.Wait()
	if err := spans.Close(within(t, 20*time.Second)); err != nil {
		t.Fatal(err)
	}
	found := storedNames(t, client, rollout)
	for _, name := range all {
		if found[name.(string)] != 1 {
			t.Fatalf("%s is stored %d times", name, found[name.(string)])
		}
	}
}

func TestANewerStreamerFencesTheOlder(t *testing.T) {
	client := startStore(t).client()
	rollout, attempt := startAttempt(t, client)
	ctx := within(t, 20*time.Second)
	send := func(spans *SpanStreamer) error {
		_, err := spans.Send(ctx, &pb.AttemptSpans{RolloutId: rollout, AttemptId: attempt, Spans: []*pb.Span{newSpan("x")}})
		return err
	}
	older := client.Spans("one")
	if err := send(older); err != nil {
		t.Fatal(err)
	}
	newer := client.Spans("one")
	if err := send(newer); err != nil {
		t.Fatal(err)
	}
	var err error
	eventually(t, "the older one is told", func() bool { err = send(older); return err != nil })
	if !errors.Is(err, StreamFenced) {
		t.Errorf("got %v", err)
	}
	if err := newer.Close(ctx); err != nil {
		t.Error(err)
	}
	_ = older.Close(ctx)
}

func TestLeasesSurviveAKillOfTheStore(t *testing.T) {
	store := startStore(t)
	client := store.client()
	stream := client.Lease(LeaseOptions{WorkerID: "w", Lease: 1500 * time.Millisecond, Credits: 1})
	enqueue(t, client, "", 1)
	ctx := within(t, 60*time.Second)
	var lease *pb.Lease
	next := func(until func(LeaseEvent) bool) {
		for {
			event, err := stream.Next(ctx)
			if err != nil {
				t.Fatal(err)
			}
			if _, lost := event.(Lost); lost {
				t.Fatal("the lease was lost")
			}
			if until(event) {
				return
			}
		}
	}
	next(func(event LeaseEvent) bool {
		work, ok := event.(Delivered)
		if ok {
			lease = work.Work.Lease
		}
		return ok
	})
	store.down(syscall.SIGKILL)
	next(func(event LeaseEvent) bool { _, ok := event.(Disconnected); return ok })
	store.up()
	next(func(event LeaseEvent) bool { _, ok := event.(Connected); return ok })
	time.Sleep(2 * time.Second) // longer than the lease: only renewals keep it
	if _, err := stream.Complete(lease, &pb.Completion{Status: pb.AttemptStatus_ATTEMPT_STATUS_SUCCEEDED}); err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Complete(lease, &pb.Completion{Status: pb.AttemptStatus_ATTEMPT_STATUS_FAILED}); err == nil {
		t.Error("an attempt was completed twice")
	}
	if err := stream.Close(ctx); err != nil {
		t.Error(err)
	}
}

package agl

import (
	"context"
	"errors"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

func quiet(string, ...interface{}) {}

func waitFor(t *testing.T, client *Client, ids ...string) map[string]*pb.Rollout {
	t.Helper()
	done, err := client.Wait(within(t, 60*time.Second), pb.WaitUntil_WAIT_UNTIL_TERMINAL, ids...)
	if err != nil {
		t.Fatal(err)
	}
	found := map[string]*pb.Rollout{}
	for _, rollout := range done {
		found[rollout.RolloutId] = rollout
	}
	return found
}

func TestAWorkerFinishesEveryRolloutWhileTheStoreIsKilled(t *testing.T) {
	store := startStore(t)
	client := store.client()
	var inputs []interface{}
	for n := 0; n < 60; n++ {
		inputs = append(inputs, n)
	}
	ids := enqueue(t, client, "", inputs...)
	var calls int32
	agent := func(ctx context.Context, task *Task) error {
		var n float64
		if err := task.Decode(&n); err != nil {
			return err
		}
		if atomic.AddInt32(&calls, 1) == 20 {
			store.down(syscall.SIGKILL)
			store.up()
		}
		if err := task.Emit(ctx, "thought", Values{"n": n}); err != nil {
			return err
		}
		return task.Reward("", n)
	}
	worker := &Worker{Client: client, Agent: agent, Options: LeaseOptions{Credits: 8}, Log: quiet}
	ctx, leave := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- worker.Run(ctx) }()
	for id, rollout := range waitFor(t, client, ids...) {
		if rollout.Status != pb.RolloutStatus_ROLLOUT_STATUS_SUCCEEDED {
			t.Errorf("%s is %s: %v", id, rollout.Status, rollout.Failure)
		}
	}
	leave()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	rewards, err := client.Store.ListRewards(within(t, 20*time.Second), &pb.ListRewardsRequest{RolloutIds: ids})
	if err != nil || len(rewards.Rewards) != 60 {
		t.Fatalf("%d rewards, %v", len(rewards.GetRewards()), err)
	}
}

func TestAgentsThatFailPanicOrHang(t *testing.T) {
	client := startStore(t).client()
	ids := enqueue(t, client, "q", "error", "panic", "nan")
	slow, err := client.Enqueue(within(t, 20*time.Second), &pb.RolloutSpec{Queue: "q", Config: &pb.RolloutConfig{Timeout: durationpb.New(300 * time.Millisecond)}})
	if err != nil {
		t.Fatal(err)
	}
	ids = append(ids, slow[0].RolloutId)
	agent := func(ctx context.Context, task *Task) error {
		switch string(task.Input) {
		case `"error"`:
			return errors.New("no such thing\nsecond line")
		case `"panic"`:
			panic("boom")
		case `"nan"`:
			zero := 0.0
			return task.Reward("", zero/zero)
		}
		<-ctx.Done()
		return ctx.Err()
	}
	worker := &Worker{Client: client, Agent: agent, Options: LeaseOptions{Queues: []string{"q"}, Credits: 4}, MaxRollouts: 4, Log: quiet}
	if err := worker.Run(within(t, 60*time.Second)); err != nil {
		t.Fatal(err)
	}
	found := waitFor(t, client, ids...)
	for index, want := range []string{"no such thing", "panic: boom", `the reward "" is NaN; rewards are finite numbers`} {
		failure := found[ids[index]].GetFailure()
		if failure.GetMessage() != want || failure.GetKind() != pb.FailureKind_FAILURE_KIND_AGENT {
			t.Errorf("got %v, not %q", failure, want)
		}
	}
	if status := found[ids[3]].GetStatus(); status != pb.RolloutStatus_ROLLOUT_STATUS_FAILED {
		t.Errorf("the one that hangs is %s", status)
	}
}

func TestACancelledAgentIsToldAndADrainedWorkerLeaves(t *testing.T) {
	client := startStore(t).client()
	ids := enqueue(t, client, "", "x")
	told := make(chan struct{})
	agent := func(ctx context.Context, task *Task) error {
		request := &pb.CancelRolloutsRequest{Filter: &pb.RolloutFilter{RolloutIdIn: ids}, Reason: "enough"}
		if _, err := client.Store.CancelRollouts(context.Background(), request); err != nil {
			return err
		}
		<-ctx.Done()
		close(told)
		return nil
	}
	worker := &Worker{Client: client, Agent: agent, Options: LeaseOptions{WorkerID: "drained"}, Log: quiet}
	ended := make(chan error, 1)
	go func() { ended <- worker.Run(context.Background()) }()
	select {
	case <-told:
	case <-time.After(20 * time.Second):
		t.Fatal("the agent was not told")
	}
	if _, err := client.Store.DrainWorkers(within(t, 20*time.Second), &pb.DrainWorkersRequest{WorkerIds: []string{"drained"}}); err != nil {
		t.Fatal(err)
	}
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if status := waitFor(t, client, ids...)[ids[0]].GetStatus(); status != pb.RolloutStatus_ROLLOUT_STATUS_CANCELLED {
		t.Errorf("it is %s", status)
	}
}

func TestTheURLOfAnAttempt(t *testing.T) {
	for given, want := range map[string]string{"http://h:1/v1": "http://h:1/rollout/r/attempt/a/v1", "http://h:1/": "http://h:1/rollout/r/attempt/a"} {
		if found := AttemptURL(given, "r", "a"); found != want {
			t.Errorf("%s became %s", given, found)
		}
	}
}

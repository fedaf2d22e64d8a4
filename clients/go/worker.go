package agl

import (
	"context"
	"crypto/rand"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"math"
	"os"
	"os/signal"
	"runtime"
	"runtime/debug"
	"strings"
	"sync"
	"syscall"
	"time"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

const (
	heartbeatEvery = 10 * time.Second
	stopWithin     = 2 * time.Second
	timeoutMargin  = time.Second
)

// Task is one rollout as its agent sees it.
type Task struct {
	// Input is the task as JSON.
	Input   json.RawMessage
	Rollout *pb.Rollout
	Attempt *pb.Attempt
	// Resources are those that the rollout is bound to; nil = none were published.
	Resources *pb.ResourceSet
	// Model is the first model among the resources, its base URL naming this attempt; nil = none.
	Model *Model
	// Credential lets the agent call the model and append spans for this attempt, nothing else.
	Credential string

	spans   *SpanStreamer
	mutex   sync.Mutex
	rewards []*pb.Reward
}

// Decode reads the input into a value.
func (t *Task) Decode(into interface{}) error { return json.Unmarshal(t.Input, into) }

// Reward notes a reward; name "" = primary.
func (t *Task) Reward(name string, value float64) error {
	return t.AddReward(&pb.Reward{Name: name, Value: &value})
}

// AddReward notes a reward of a step or a span.
func (t *Task) AddReward(reward *pb.Reward) error {
	if reward.Value == nil || math.IsNaN(*reward.Value) || math.IsInf(*reward.Value, 0) {
		return fmt.Errorf("the reward %q is %v; rewards are finite numbers", reward.Name, reward.GetValue())
	}
	t.mutex.Lock()
	defer t.mutex.Unlock()
	t.rewards = append(t.rewards, reward)
	return nil
}

// Emit stores a span of this attempt and waits until it is on disk.
func (t *Task) Emit(ctx context.Context, name string, attributes Values) error {
	entries, err := attributes.KeyValues()
	if err != nil {
		return err
	}
	now := uint64(time.Now().UnixNano())
	ids := make([]byte, 24)
	if _, err := rand.Read(ids); err != nil {
		return err
	}
	span := &pb.Span{TraceId: ids[:16], SpanId: ids[16:], Name: name, Attributes: entries, StartTimeUnixNano: now, EndTimeUnixNano: now}
	ack, err := t.spans.Send(ctx, &pb.AttemptSpans{RolloutId: t.Rollout.RolloutId, AttemptId: t.Attempt.AttemptId, Spans: []*pb.Span{span}})
	if err == nil && len(ack.Rejected) > 0 {
		err = ack.Rejected[0].Err
	}
	return err
}

// Agent works on a task; it notes rewards with Task.Reward. An error fails the attempt (kind AGENT).
type Agent func(ctx context.Context, task *Task) error

// Worker runs an agent on leased rollouts until it is told to leave.
//
// The agent's context ends when it has to stop: cancelled, out of time, or its lease was lost. An
// agent that panics fails its attempt. Results are kept and delivered while the store is away.
type Worker struct {
	Client *Client
	Agent  Agent
	// Options say which work it takes; Credits is the number of rollouts at a time, default 1.
	Options LeaseOptions
	// MaxRollouts makes it leave after so many; 0 = never.
	MaxRollouts int64
	// Grace is how long running agents may go on after the context of Run ends; default 30 s.
	Grace time.Duration
	// Log has one line for each thing worth knowing; default: the standard logger.
	Log func(format string, values ...interface{})

	stream  *LeaseStream
	spans   *SpanStreamer
	mutex   sync.Mutex
	running map[string]context.CancelFunc
	granted int64
	ended   int64
	idle    string
	agents  sync.WaitGroup
}

// Run works until the context ends, a drain command of the store, MaxRollouts, SIGINT or SIGTERM.
func (w *Worker) Run(ctx context.Context) error {
	ctx, cancel := signal.NotifyContext(ctx, os.Interrupt, syscall.SIGTERM)
	defer cancel()
	w.prepare()
	w.stream, w.spans = w.Client.Lease(w.Options), w.Client.Spans(w.Options.WorkerID+"/"+newID())
	beats, stopBeats := context.WithCancel(context.Background())
	go w.beat(beats)
	err := w.follow(ctx)
	w.finish()
	stopBeats()
	last, done := context.WithTimeout(context.Background(), 10*time.Second)
	defer done()
	if closing := w.spans.Close(last); err == nil && !errors.Is(closing, context.Canceled) {
		err = closing
	}
	if closing := w.stream.Close(last); err == nil {
		err = closing
	}
	return err
}

func (w *Worker) prepare() {
	if w.Log == nil {
		w.Log = log.Printf
	}
	if w.Grace == 0 {
		w.Grace = 30 * time.Second
	}
	if w.Options.WorkerID == "" {
		host, _ := os.Hostname()
		w.Options.WorkerID = fmt.Sprintf("%s-go-%d-%s", host, os.Getpid(), newID()[:8])
	}
	if w.Options.Credits == 0 {
		w.Options.Credits = 1
	}
	if w.MaxRollouts > 0 && w.Options.Credits > w.MaxRollouts {
		w.Options.Credits = w.MaxRollouts
	}
	w.granted, w.running, w.idle = w.Options.Credits, map[string]context.CancelFunc{}, "connecting"
}

func (w *Worker) follow(ctx context.Context) error {
	for {
		event, err := w.stream.Next(ctx)
		if err != nil {
			if ctx.Err() != nil {
				w.stream.Drain("told to leave")
				return nil
			}
			return err
		}
		if w.react(event) {
			return nil
		}
	}
}

// react answers whether the worker leaves.
func (w *Worker) react(event LeaseEvent) bool {
	switch event := event.(type) {
	case Delivered:
		w.take(event.Work)
	case Lost:
		w.stop(event.AttemptID, fmt.Sprintf("its lease was lost: %v", event.Err))
	case Commanded:
		return w.obey(event.Command)
	case Idle:
		w.say(event.Reason)
	case Connected:
		w.Log("%s is connected to the store at %s", w.Options.WorkerID, w.Client.target)
		w.say("no work")
	case Disconnected:
		w.Log("the store is away (%v): results are kept", event.Err)
		w.say("the store is away")
	case allDone:
		return true
	}
	return false
}

// allDone is the worker's own event: MaxRollouts are finished.
type allDone struct{}

func (allDone) leaseEvent() {}

func (w *Worker) obey(command *pb.WorkerCommand) bool {
	if command.Kind == pb.CommandKind_COMMAND_KIND_CANCEL {
		w.stop(command.AttemptId, "cancelled: "+command.Reason)
	}
	w.stream.Acknowledge(command)
	if command.Kind == pb.CommandKind_COMMAND_KIND_DRAIN {
		w.stream.Drain(command.Reason)
		return true
	}
	return false
}

func (w *Worker) say(reason string) {
	w.mutex.Lock()
	changed := w.idle != reason
	w.idle = reason
	w.mutex.Unlock()
	if changed {
		go w.heartbeat(context.Background())
	}
}

func (w *Worker) stop(attemptID, reason string) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	if cancel := w.running[attemptID]; cancel != nil {
		w.Log("attempt %s is stopped: %s", attemptID, reason)
		delete(w.running, attemptID) // nothing more is to be said of it
		cancel()
	}
}

func (w *Worker) finish() {
	done := make(chan struct{})
	go func() { w.agents.Wait(); close(done) }()
	select {
	case <-done:
		return
	case <-time.After(w.Grace):
	}
	w.mutex.Lock()
	for id, cancel := range w.running {
		delete(w.running, id)
		cancel()
	}
	w.mutex.Unlock()
	select {
	case <-done:
	case <-time.After(stopWithin):
	}
}

func (w *Worker) take(work *pb.LeasedRollout) {
	ctx, cancel := context.WithCancel(context.Background())
	id := work.Lease.AttemptId
	w.mutex.Lock()
	w.running[id] = cancel
	w.mutex.Unlock()
	w.agents.Add(1)
	go func() {
		defer w.agents.Done()
		defer cancel()
		if err := w.attend(ctx, work); err != nil {
			w.Log("attempt %s: its result was not taken: %v", id, err)
		}
		w.done(id)
	}()
}

func (w *Worker) done(id string) {
	w.mutex.Lock()
	defer w.mutex.Unlock()
	delete(w.running, id)
	w.ended++
	if w.MaxRollouts == 0 || w.granted < w.MaxRollouts {
		w.granted++
		w.stream.Grant(1)
	} else if w.ended == w.MaxRollouts {
		w.stream.events.push(allDone{})
	}
}

func (w *Worker) attend(ctx context.Context, work *pb.LeasedRollout) error {
	task := &Task{
		Rollout: work.Rollout, Attempt: work.Attempt, Resources: work.Resources, Model: BindModel(work.Resources, work.Lease, ""),
		Credential: work.Lease.AttemptCredential, spans: w.spans,
	}
	failure := w.execute(ctx, work, task)
	w.mutex.Lock()
	_, wanted := w.running[work.Lease.AttemptId]
	w.mutex.Unlock()
	if !wanted {
		return nil
	}
	task.mutex.Lock()
	completion := &pb.Completion{Status: pb.AttemptStatus_ATTEMPT_STATUS_SUCCEEDED, Rewards: task.rewards}
	task.mutex.Unlock()
	if failure != nil {
		completion.Status, completion.Failure = pb.AttemptStatus_ATTEMPT_STATUS_FAILED, failure
	}
	_, err := w.stream.Complete(work.Lease, completion)
	return err
}

func (w *Worker) execute(ctx context.Context, work *pb.LeasedRollout, task *Task) *pb.Failure {
	if err := w.Client.Load(ctx, work.Rollout.Input, &task.Input); err != nil {
		return failureOf(err, pb.FailureKind_FAILURE_KIND_INFRASTRUCTURE, "")
	}
	limit := work.Rollout.GetConfig().GetTimeout()
	bounded := ctx
	if limit != nil {
		var cancel context.CancelFunc
		bounded, cancel = context.WithTimeout(ctx, limit.AsDuration())
		defer cancel()
	}
	ended := make(chan *pb.Failure, 1)
	go func() { ended <- w.call(bounded, task) }()
	select {
	case failure := <-ended:
		if bounded.Err() != context.DeadlineExceeded {
			return failure
		}
	case <-bounded.Done():
	}
	if ctx.Err() != nil {
		return nil // stopped: nothing is reported
	}
	// The store's own timer ends the attempt first, unless the store is away.
	pause(ctx, timeoutMargin)
	message := fmt.Sprintf("the attempt took longer than its timeout of %s", limit.AsDuration())
	return &pb.Failure{Kind: pb.FailureKind_FAILURE_KIND_TRUNCATED, Type: "timeout", Message: message}
}

func (w *Worker) call(ctx context.Context, task *Task) (failure *pb.Failure) {
	defer func() {
		if value := recover(); value != nil {
			failure = failureOf(fmt.Errorf("panic: %v", value), pb.FailureKind_FAILURE_KIND_AGENT, string(debug.Stack()))
		}
	}()
	if err := w.Agent(ctx, task); err != nil {
		return failureOf(err, pb.FailureKind_FAILURE_KIND_AGENT, "")
	}
	return nil
}

func failureOf(err error, kind pb.FailureKind, detail string) *pb.Failure {
	message := strings.ToValidUTF8(strings.SplitN(err.Error(), "\n", 2)[0], "?")
	if len(message) > 1000 {
		message = strings.ToValidUTF8(message[:1000], "")
	}
	return &pb.Failure{Kind: kind, Type: fmt.Sprintf("%T", err), Message: message, Detail: detail}
}

func (w *Worker) beat(ctx context.Context) {
	for pause(ctx, heartbeatEvery) {
		w.heartbeat(ctx)
	}
}

func (w *Worker) heartbeat(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, heartbeatEvery)
	defer cancel()
	w.mutex.Lock()
	busy, idle := len(w.running) > 0, w.idle
	w.mutex.Unlock()
	status := pb.WorkerStatus_WORKER_STATUS_IDLE
	if busy {
		status, idle = pb.WorkerStatus_WORKER_STATUS_BUSY, ""
	}
	var memory runtime.MemStats
	runtime.ReadMemStats(&memory)
	stats, _ := Values{"pid": os.Getpid(), "memory.sys_bytes": memory.Sys, "runtime": runtime.Version()}.KeyValues()
	request := &pb.HeartbeatRequest{WorkerId: w.Options.WorkerID, Stats: stats, IdleReason: idle, Status: status}
	if _, err := w.Client.Runner.Heartbeat(ctx, request); err != nil && !transient(err) {
		w.Log("no heartbeat: %v", err)
	}
}

package agl

import (
	"bytes"
	"context"
	"errors"
	"net"
	"reflect"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

func TestInputsComeBackAsTheyWerePutIn(t *testing.T) {
	client := startStore(t).client()
	large := map[string]interface{}{"text": strings.Repeat("x", 3<<20)}
	small := map[string]interface{}{"q": "1+1", "n": []interface{}{1.0, 2.5, nil}}
	ids := enqueue(t, client, "", small, large)
	for index, want := range []interface{}{small, large} {
		read, err := client.Store.GetRollout(within(t, 20*time.Second), &pb.GetRolloutRequest{RolloutId: ids[index]})
		if err != nil {
			t.Fatal(err)
		}
		var found interface{}
		if err := client.Load(within(t, 20*time.Second), read.Rollout.Rollout.Input, &found); err != nil {
			t.Fatal(err)
		}
		if !reflect.DeepEqual(found, want) {
			t.Errorf("input %d came back as another value", index)
		}
	}
}

func TestErrorsCarryReasonAndInfo(t *testing.T) {
	client := startStore(t).client()
	ctx := within(t, 20*time.Second)
	_, err := client.Store.GetRollout(ctx, &pb.GetRolloutRequest{RolloutId: "ro-none"})
	var known *Error
	if !errors.As(err, &known) || known.Code != codes.NotFound || !errors.Is(err, EntityNotFound) || errors.Is(err, LeaseLost) {
		t.Fatalf("got %v", err)
	}
	if known.Info["id"] != "ro-none" || known.Info["entity"] != "rollout" {
		t.Errorf("info is %v", known.Info)
	}
	_, err = client.Enqueue(ctx, &pb.RolloutSpec{Priority: 5000})
	if !errors.As(err, &known) || known.Info["field"] == "" {
		t.Errorf("got %v", err)
	}
	wrong := client.with(WithCredential("agl1.bm9uZQ.bm9uZQ"), t)
	if _, err = wrong.Enqueue(ctx, &pb.RolloutSpec{}); !errors.Is(err, Unauthenticated) {
		t.Errorf("a wrong credential: %v", err)
	}
}

func (c *Client) with(option Option, t *testing.T) *Client {
	other, err := Dial(c.target, option)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = other.Close() })
	return other
}

func TestAMessageOverTheLimitIsNotTriedAgain(t *testing.T) {
	client := startStore(t).client()
	payload := &pb.Payload{Content: &pb.Payload_Data{Data: bytes.Repeat([]byte("x"), 65<<20)}}
	_, err := client.Enqueue(within(t, 20*time.Second), &pb.RolloutSpec{Input: payload})
	var known *Error
	if !errors.As(err, &known) || known.Code != codes.ResourceExhausted || !errors.Is(err, MessageTooLarge) {
		t.Fatalf("got %v", err)
	}
	if known.Info["limit_bytes"] != "67108864" || transient(err) {
		t.Errorf("got %v, %v", known.Info, err)
	}
	stream, err := client.Store.PutBlob(within(t, 20*time.Second))
	if err != nil {
		t.Fatal(err)
	}
	chunk := &pb.PutBlobRequest{Message: &pb.PutBlobRequest_Chunk{Chunk: payload.GetData()}}
	if err := stream.Send(chunk); !errors.Is(err, MessageTooLarge) {
		t.Errorf("on a stream: %v", err)
	}
}

// laterServer is a server of a later contract, of which this client knows only the question what it is.
type laterServer struct {
	pb.UnimplementedStoreServiceServer
	calls int32
}

func (s *laterServer) GetServerInfo(context.Context, *pb.GetServerInfoRequest) (*pb.GetServerInfoResponse, error) {
	return &pb.GetServerInfoResponse{ServerVersion: "9.0", ContractVersion: "v9"}, nil
}

func (s *laterServer) EnqueueRollouts(context.Context, *pb.EnqueueRolloutsRequest) (*pb.EnqueueRolloutsResponse, error) {
	atomic.AddInt32(&s.calls, 1)
	return nil, status.Error(codes.Unimplemented, "gone")
}

func TestAServerOfAnotherVersionIsNamed(t *testing.T) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	later, server := &laterServer{}, grpc.NewServer()
	pb.RegisterStoreServiceServer(server, later)
	go func() { _ = server.Serve(listener) }()
	defer server.Stop()
	quick := RetryPolicy{Timeout: 20 * time.Second, FirstWait: time.Millisecond, LongestWait: time.Millisecond}
	client, err := Dial(listener.Addr().String(), WithRetry(quick))
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = client.Close() }()
	ctx := within(t, 20*time.Second)
	_, err = client.Require(ctx)
	var known *Error
	if !errors.As(err, &known) || !errors.Is(err, MethodUnimplemented) || known.Info["contract_version"] != "v9" || !strings.Contains(err.Error(), "9.0") {
		t.Errorf("got %v", err)
	}
	// What it does not serve is tried once, and streams end instead of being opened for ever.
	if _, err = client.Enqueue(ctx, &pb.RolloutSpec{}); !errors.As(err, &known) || known.Code != codes.Unimplemented || later.calls != 1 {
		t.Errorf("got %v after %d calls", err, later.calls)
	}
	stream := client.Lease(LeaseOptions{WorkerID: "w", Credits: 1})
	for err = nil; err == nil; {
		_, err = stream.Next(ctx)
	}
	if !errors.As(err, &known) || known.Code != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
	group := &pb.AttemptSpans{RolloutId: "r", AttemptId: "a", Spans: []*pb.Span{newSpan("x")}}
	if _, err = client.Spans("").Send(ctx, group); !errors.As(err, &known) || known.Code != codes.Unimplemented {
		t.Errorf("got %v", err)
	}
}

func TestWhatAServerLacksIsNamed(t *testing.T) {
	client := startStore(t).client()
	if found, err := client.Require(within(t, 20*time.Second), "blobs"); err != nil || found.Backend != "sqlite" {
		t.Fatalf("got %v %v", found, err)
	}
	_, err := client.Require(within(t, 20*time.Second), "blobs", "telepathy", "magic")
	var known *Error
	if !errors.As(err, &known) || known.Info["missing"] != "telepathy,magic" || !errors.Is(err, MethodUnimplemented) {
		t.Errorf("got %v", err)
	}
}

func TestFieldsOfANewerContractSurvive(t *testing.T) {
	wire := []byte{0x0a, 0x01, 'a', 0xfa, 0x3e, 0x02, 'h', 'i'}
	rollout := &pb.Rollout{}
	if err := proto.Unmarshal(wire, rollout); err != nil {
		t.Fatal(err)
	}
	again, _ := proto.Marshal(rollout)
	if !bytes.Equal(again, wire) {
		t.Errorf("got % x", again)
	}
}

func TestValuesSurvive(t *testing.T) {
	values := Values{"a": []interface{}{int64(1), -2.5, true, nil, "ü", int64(1) << 60}, "b": Values{"c": []byte{1, 2}}}
	entries, err := values.KeyValues()
	if err != nil {
		t.Fatal(err)
	}
	if found := FromKeyValues(entries); !reflect.DeepEqual(found, values) {
		t.Errorf("got %v", found)
	}
	if _, err := (Values{"x": make(chan int)}).KeyValues(); err == nil || !strings.Contains(err.Error(), "x: a chan int") {
		t.Errorf("got %v", err)
	}
}

func TestCallsAreTriedAgainWhileTheStoreRestarts(t *testing.T) {
	store := startStore(t)
	client := store.client()
	enqueue(t, client, "", 1)
	store.down(syscall.SIGKILL)
	done := make(chan error, 1)
	go func() {
		_, err := client.Enqueue(context.Background(), &pb.RolloutSpec{})
		done <- err
	}()
	store.up()
	if err := <-done; err != nil {
		t.Fatal(err)
	}
}

func TestAWatchGoesOnWithoutAGapOrARepeat(t *testing.T) {
	store := startStore(t)
	client := store.client()
	latest, err := client.Store.GetLatestResources(within(t, 20*time.Second), &pb.GetLatestResourcesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	var seen []int64
	done := make(chan error, 1)
	enough := errors.New("enough")
	ctx := within(t, 60*time.Second)
	go func() {
		done <- client.WatchResources(ctx, &pb.WatchResourcesRequest{Cursor: latest.Position}, func(found *pb.WatchResourcesResponse) error {
			for _, set := range found.Resources {
				seen = append(seen, set.Version)
			}
			if len(seen) >= 6 {
				return enough
			}
			return nil
		})
	}()
	for n := 0; n < 6; n++ {
		if n == 3 {
			store.down(syscall.SIGKILL)
			store.up()
		}
		if _, err := client.Store.PublishResources(ctx, &pb.PublishResourcesRequest{ResourcesId: "rs-watch"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := <-done; err != enough {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(seen, []int64{1, 2, 3, 4, 5, 6}) {
		t.Errorf("seen %v", seen)
	}
}

func TestAStoreThatIsNotThereEndsByTheDeadline(t *testing.T) {
	silent, err := net.Listen("tcp", "127.0.0.1:0") // takes connections and says nothing
	if err != nil {
		t.Fatal(err)
	}
	defer silent.Close()
	for _, target := range []string{freeAddress(t), silent.Addr().String()} {
		client, err := Dial(target, WithRetry(RetryPolicy{Timeout: 400 * time.Millisecond, FirstWait: time.Millisecond, LongestWait: 50 * time.Millisecond}))
		if err != nil {
			t.Fatal(err)
		}
		started := time.Now()
		_, err = client.Store.GetServerInfo(context.Background(), &pb.GetServerInfoRequest{})
		if err == nil || !strings.Contains(err.Error(), "cannot be reached") {
			t.Errorf("got %v", err)
		}
		if time.Since(started) > 5*time.Second {
			t.Errorf("took %s", time.Since(started))
		}
		_ = client.Close()
	}
	if _, err := Dial("nonsense"); err == nil || !strings.Contains(err.Error(), "host:port") {
		t.Errorf("got %v", err)
	}
}

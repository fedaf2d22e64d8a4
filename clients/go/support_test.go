package agl

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

// testStore is a real store on disk that can be stopped, killed and started again on its port.
type testStore struct {
	t       *testing.T
	target  string
	folder  string
	process *exec.Cmd
}

func startStore(t *testing.T) *testStore {
	t.Helper()
	s := &testStore{t: t, target: freeAddress(t), folder: t.TempDir()}
	s.up()
	t.Cleanup(func() { s.down(syscall.SIGTERM) })
	return s
}

func (s *testStore) up() {
	s.t.Helper()
	command := os.Getenv("AGL_GRPC_COMMAND")
	if command == "" {
		command = "agl-grpc"
	}
	words := strings.Fields(command)
	_, port, _ := net.SplitHostPort(s.target)
	words = append(words, "store", "serve", "--database", filepath.Join(s.folder, "agl.db"), "--port", port, "--no-http")
	s.process = exec.Command(words[0], words[1:]...)
	output, err := s.process.StderrPipe()
	if err != nil {
		s.t.Fatal(err)
	}
	s.process.Stdout = s.process.Stderr
	if err := s.process.Start(); err != nil {
		s.t.Fatal(err)
	}
	lines := bufio.NewScanner(output)
	var seen []string
	for lines.Scan() {
		seen = append(seen, lines.Text())
		if strings.Contains(lines.Text(), "Starting server") {
			go func() { _, _ = io.Copy(io.Discard, output) }()
			return
		}
	}
	s.t.Fatalf("the store did not start:\n%s", strings.Join(seen, "\n"))
}

func (s *testStore) down(signal syscall.Signal) {
	if s.process.ProcessState == nil {
		_ = s.process.Process.Signal(signal)
		_ = s.process.Wait()
	}
}

func (s *testStore) client(options ...Option) *Client {
	s.t.Helper()
	client, err := Dial(s.target, options...)
	if err != nil {
		s.t.Fatal(err)
	}
	s.t.Cleanup(func() { _ = client.Close() })
	return client
}

func freeAddress(t *testing.T) string {
	t.Helper()
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer listener.Close()
	return listener.Addr().String()
}

func within(t *testing.T, limit time.Duration) context.Context {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), limit)
	t.Cleanup(cancel)
	return ctx
}

func eventually(t *testing.T, what string, holds func() bool) {
	t.Helper()
	for end := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within 20 s: %s", what)
		}
	}
}

func enqueue(t *testing.T, client *Client, queue string, inputs ...interface{}) []string {
	t.Helper()
	var specs []*pb.RolloutSpec
	for _, input := range inputs {
		payload, err := client.Payload(within(t, 20*time.Second), input)
		if err != nil {
			t.Fatal(err)
		}
		specs = append(specs, &pb.RolloutSpec{Input: payload, Queue: queue})
	}
	made, err := client.Enqueue(within(t, 20*time.Second), specs...)
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, rollout := range made {
		ids = append(ids, rollout.RolloutId)
	}
	return ids
}

func newSpan(name string) *pb.Span {
	now, id := uint64(time.Now().UnixNano()), []byte(newID())
	return &pb.Span{TraceId: id[:16], SpanId: id[16:24], Name: name, StartTimeUnixNano: now, EndTimeUnixNano: now}
}

func startAttempt(t *testing.T, client *Client) (rollout, attempt string) {
	t.Helper()
	started, err := client.Store.StartRollout(within(t, 20*time.Second), &pb.StartRolloutRequest{Rollout: &pb.RolloutSpec{Input: &pb.Payload{Content: &pb.Payload_Data{Data: []byte("{}")}}}})
	if err != nil {
		t.Fatal(err)
	}
	return started.Rollout.Rollout.RolloutId, started.Rollout.Attempt.AttemptId
}

func storedNames(t *testing.T, client *Client, rollout string) map[string]int {
	t.Helper()
	names := map[string]int{}
	err := client.ExportSpans(within(t, 20*time.Second), &pb.ExportSpansRequest{RolloutIds: []string{rollout}}, func(page *pb.ExportSpansResponse) error {
		for _, span := range page.Spans {
			names[span.Span.Name]++
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return names
}

func names(count int) []interface{} {
	var all []interface{}
	for n := 0; n < count; n++ {
		all = append(all, fmt.Sprintf("s-%d", n))
	}
	return all
}

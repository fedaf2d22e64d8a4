package agl

import (
	"context"
	"crypto/rand"
	"encoding/hex"
	"math"
	mathrand "math/rand"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/reflect/protoreflect"
)

// RetryPolicy says how long and how often a call is tried again. Waits start at FirstWait and double
// up to LongestWait, each shortened at random so that many clients do not come back in step.
type RetryPolicy struct {
	// Timeout bounds one logical call with all its tries, where its context has no deadline.
	Timeout     time.Duration
	FirstWait   time.Duration
	LongestWait time.Duration
}

// DefaultRetry is the policy of a client that is given none.
var DefaultRetry = RetryPolicy{Timeout: 120 * time.Second, FirstWait: 50 * time.Millisecond, LongestWait: 2 * time.Second}

func (p RetryPolicy) wait(tries int) time.Duration {
	full := math.Min(float64(p.LongestWait), float64(p.FirstWait)*math.Pow(2, math.Min(float64(tries), 16)))
	return time.Duration(full * (0.5 + mathrand.Float64()/2))
}

// again waits before another try; false when the context ends before.
func (p RetryPolicy) again(ctx context.Context, err error, tries int) bool {
	wait := retryAfter(err)
	if wait == 0 {
		wait = p.wait(tries)
	}
	if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < wait {
		return false
	}
	return pause(ctx, wait)
}

func pause(ctx context.Context, wait time.Duration) bool {
	timer := time.NewTimer(wait)
	defer timer.Stop()
	select {
	case <-timer.C:
		return true
	case <-ctx.Done():
		return false
	}
}

// unary mints a request id once, keeps it over all tries, and tries again what may be tried again.
func (c *Client) unary(ctx context.Context, method string, req, reply interface{}, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	if _, bounded := ctx.Deadline(); !bounded {
		var cancel context.CancelFunc
		ctx, cancel = context.WithTimeout(ctx, c.retry.Timeout)
		defer cancel()
	}
	mintRequestID(req)
	for tries := 0; ; tries++ {
		err := typed(invoke(ctx, method, req, reply, conn, opts...), c.target)
		if err == nil || ctx.Err() != nil || !transient(err) || !c.retry.again(ctx, err, tries) {
			return err
		}
		proto.Reset(reply.(proto.Message))
	}
}

func mintRequestID(req interface{}) {
	message, ok := req.(proto.Message)
	if !ok {
		return
	}
	reflected := message.ProtoReflect()
	field := reflected.Descriptor().Fields().ByName("request_id")
	if field != nil && field.Kind() == protoreflect.StringKind && reflected.Get(field).String() == "" {
		reflected.Set(field, protoreflect.ValueOfString(newID()))
	}
}

func newID() string {
	var id [16]byte
	if _, err := rand.Read(id[:]); err != nil {
		panic(err) // the system's source of randomness is gone: nothing can be told apart any more
	}
	return hex.EncodeToString(id[:])
}

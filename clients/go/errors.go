package agl

import (
	"context"
	"errors"
	"strconv"
	"strings"
	"time"

	"google.golang.org/genproto/googleapis/rpc/errdetails"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

const domain = "agl-grpc"

// Error is a call that the store refused, or for which it could not be reached.
type Error struct {
	// Code is the gRPC status.
	Code codes.Code
	// Reason is the name from the contract's ErrorReason without its prefix; empty when there is none.
	Reason string
	// Info has machine-readable details, for example the path of a field.
	Info map[string]string
	// RetryAfter is how long the store asks to wait before another try; 0 when it does not.
	RetryAfter time.Duration
	// Message is one line for people.
	Message string
}

// Error answers the message with its reason, or its code.
func (e *Error) Error() string {
	if e.Reason != "" {
		return e.Reason + ": " + e.Message
	}
	return e.Code.String() + ": " + e.Message
}

// Is tells whether the error has a Reason: errors.Is(err, agl.LeaseLost).
func (e *Error) Is(target error) bool {
	reason, ok := target.(Reason)
	return ok && string(reason) == e.Reason
}

// GRPCStatus lets status.Code and status.FromError read the error.
func (e *Error) GRPCStatus() *status.Status { return status.New(e.Code, e.Message) }

// Reason is a name from the contract's ErrorReason, for errors.Is.
type Reason string

func (r Reason) Error() string { return string(r) }

// Reasons of errors; the contract says what each means.
const (
	InvalidField        Reason = "INVALID_FIELD"
	EntityNotFound      Reason = "ENTITY_NOT_FOUND"
	EntityExists        Reason = "ENTITY_EXISTS"
	LeaseLost           Reason = "LEASE_LOST"
	IllegalTransition   Reason = "ILLEGAL_TRANSITION"
	RequestIDReused     Reason = "REQUEST_ID_REUSED"
	StreamFenced        Reason = "STREAM_FENCED"
	DeltaBaseUnknown    Reason = "DELTA_BASE_UNKNOWN"
	TokensMalformed     Reason = "TOKENS_MALFORMED"
	StorageFull         Reason = "STORAGE_FULL"
	Overloaded          Reason = "OVERLOADED"
	CursorCompacted     Reason = "CURSOR_COMPACTED"
	PageTokenInvalid    Reason = "PAGE_TOKEN_INVALID"
	NotPermitted        Reason = "NOT_PERMITTED"
	Unauthenticated     Reason = "UNAUTHENTICATED"
	Draining            Reason = "DRAINING"
	MethodUnimplemented Reason = "METHOD_UNIMPLEMENTED"
	TrainerFenced       Reason = "TRAINER_FENCED"
	ReplayExpired       Reason = "REPLAY_EXPIRED"
	ResourceMissing     Reason = "RESOURCE_MISSING"
	WeightsRejected     Reason = "WEIGHTS_REJECTED"
	Internal            Reason = "INTERNAL"
	StorageAway         Reason = "STORAGE_AWAY"
	SpansEvicted        Reason = "SPANS_EVICTED"
	MessageTooLarge     Reason = "MESSAGE_TOO_LARGE"
)

// typed turns a failed call into an *Error; nil and errors that are none of gRPC's stay as they are.
func typed(err error, target string) error {
	var known *Error
	if err == nil || errors.As(err, &known) {
		return err
	}
	if errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) {
		err = status.FromContextError(err).Err()
	}
	found, ok := status.FromError(err)
	if !ok {
		return err
	}
	made := &Error{Code: found.Code(), Message: oneLine(found.Message())}
	for _, detail := range found.Details() {
		switch detail := detail.(type) {
		case *errdetails.ErrorInfo:
			if detail.Domain == domain {
				made.Reason, made.Info = detail.Reason, detail.Metadata
			}
		case *errdetails.RetryInfo:
			delay := detail.GetRetryDelay()
			made.RetryAfter = time.Duration(delay.GetSeconds())*time.Second + time.Duration(delay.GetNanos())
		}
	}
	// What gRPC itself says of a message over this process's own limit.
	if made.Reason == "" && made.Code == codes.ResourceExhausted && strings.Contains(made.Message, "larger than") {
		made.Reason, made.Info = string(MessageTooLarge), map[string]string{"limit_bytes": strconv.Itoa(maxMessageBytes)}
	}
	away := made.Code == codes.Unavailable || made.Code == codes.DeadlineExceeded
	if away && made.Reason == "" {
		made.Message = "the store at " + target + " cannot be reached: " + made.Message
	}
	return made
}

// itemError is the outcome of one item of a batched call.
func itemError(item *pb.ItemStatus) error {
	if item == nil {
		return nil
	}
	reason := strings.TrimPrefix(item.Reason.String(), "ERROR_REASON_")
	info := map[string]string{}
	for _, label := range item.Metadata {
		info[label.Key] = label.Value
	}
	return &Error{Code: codes.Code(item.Code), Reason: reason, Info: info, Message: oneLine(item.Message)}
}

// transient tells whether another try may help: the store is away or drains, a connection broke, or
// the store is overloaded and said when to come back. CANCELLED that the caller did not ask for is a
// server going away in mid-call.
func transient(err error) bool {
	var known *Error
	if !errors.As(err, &known) {
		return false
	}
	switch known.Code {
	case codes.Unavailable:
		return true
	case codes.Canceled:
		return known.Reason == ""
	case codes.ResourceExhausted:
		return known.RetryAfter > 0
	}
	return false
}

func retryAfter(err error) time.Duration {
	var known *Error
	if errors.As(err, &known) {
		return known.RetryAfter
	}
	return 0
}

func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }

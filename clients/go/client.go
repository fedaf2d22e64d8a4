// Package agl is the client of an agl-grpc store: the whole contract, typed; leased work and span
// streams that survive disconnects; watches that resume; a worker that runs a function as an agent.
package agl

import (
	"context"
	"crypto/sha256"
	"crypto/tls"
	"encoding/hex"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"strings"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/types/known/durationpb"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

const (
	contractVersion = "v1"
	maxMessageBytes = 64 << 20
	inlineBytes     = 1 << 20
	longestPoll     = 50 * time.Second
)

// Client is a client of one store. Store, Runner and Trainer are the contract's services with every
// rpc: calls mint their request id, are tried again while that is safe, end by their context's
// deadline (else RetryPolicy.Timeout), and fail with *Error. The methods add what takes more.
type Client struct {
	Store   pb.StoreServiceClient
	Runner  pb.RunnerServiceClient
	Trainer pb.TrainerServiceClient

	target     string
	run        string
	credential string
	tls        *tls.Config
	retry      RetryPolicy
	conn       *grpc.ClientConn
}

// Option changes how a Client connects.
type Option func(*Client)

// WithRun names the run that helpers use; default "default".
func WithRun(run string) Option { return func(c *Client) { c.run = run } }

// WithCredential sends a bearer credential.
func WithCredential(credential string) Option { return func(c *Client) { c.credential = credential } }

// WithTLS encrypts the connection.
func WithTLS(config *tls.Config) Option { return func(c *Client) { c.tls = config } }

// WithRetry replaces DefaultRetry.
func WithRetry(policy RetryPolicy) Option { return func(c *Client) { c.retry = policy } }

// Dial makes a client of the store at host:port; it connects at the first call.
func Dial(target string, options ...Option) (*Client, error) {
	if _, _, err := net.SplitHostPort(target); err != nil {
		return nil, fmt.Errorf("the store's address is %q; it has to be host:port, for example 127.0.0.1:4747", target)
	}
	c := &Client{target: target, run: "default", retry: DefaultRetry}
	for _, option := range options {
		option(c)
	}
	security := grpc.WithInsecure()
	if c.tls != nil {
		security = grpc.WithTransportCredentials(credentials.NewTLS(c.tls))
	}
	// A restarted store is found again quickly: gRPC's own default waits up to two minutes.
	quick := backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 250 * time.Millisecond}
	conn, err := grpc.Dial(target, security,
		grpc.WithConnectParams(grpc.ConnectParams{Backoff: quick, MinConnectTimeout: 5 * time.Second}),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 30 * time.Second, Timeout: 10 * time.Second, PermitWithoutStream: true}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxMessageBytes), grpc.MaxCallSendMsgSize(maxMessageBytes)),
		grpc.WithChainUnaryInterceptor(c.unary, c.authorisedCall),
		grpc.WithChainStreamInterceptor(c.stream),
	)
	if err != nil {
		return nil, err
	}
	c.conn = conn
	c.Store, c.Runner, c.Trainer = pb.NewStoreServiceClient(conn), pb.NewRunnerServiceClient(conn), pb.NewTrainerServiceClient(conn)
	return c, nil
}

// Conn is the connection, for calls by name.
func (c *Client) Conn() grpc.ClientConnInterface { return c.conn }

// Close closes the connection; calls under way fail.
func (c *Client) Close() error { return c.conn.Close() }

func (c *Client) authorised(ctx context.Context) context.Context {
	if c.credential == "" {
		return ctx
	}
	return metadata.AppendToOutgoingContext(ctx, "authorization", "Bearer "+c.credential)
}

func (c *Client) authorisedCall(ctx context.Context, method string, req, reply interface{}, conn *grpc.ClientConn, invoke grpc.UnaryInvoker, opts ...grpc.CallOption) error {
	return invoke(c.authorised(ctx), method, req, reply, conn, opts...)
}

func (c *Client) stream(ctx context.Context, desc *grpc.StreamDesc, conn *grpc.ClientConn, method string, open grpc.Streamer, opts ...grpc.CallOption) (grpc.ClientStream, error) {
	inner, err := open(c.authorised(ctx), desc, conn, method, opts...)
	if err != nil {
		return nil, typed(err, c.target)
	}
	return typedStream{inner, c.target}, nil
}

// typedStream fails with *Error.
type typedStream struct {
	grpc.ClientStream
	target string
}

func (s typedStream) SendMsg(message interface{}) error {
	err := s.ClientStream.SendMsg(message)
	if err == io.EOF {
		return err // why the stream ended, RecvMsg says
	}
	return typed(err, s.target)
}

func (s typedStream) RecvMsg(message interface{}) error {
	err := s.ClientStream.RecvMsg(message)
	if err == io.EOF {
		return err
	}
	return typed(err, s.target)
}

// Require makes sure that the server speaks this contract and has these capabilities, and answers what
// it is. Else it fails with MethodUnimplemented; Info has its "contract_version" and, in "missing",
// what it lacks, with commas between them.
func (c *Client) Require(ctx context.Context, capabilities ...string) (*pb.GetServerInfoResponse, error) {
	found, err := c.Store.GetServerInfo(ctx, &pb.GetServerInfoRequest{})
	if err != nil {
		return nil, err
	}
	has := map[string]bool{}
	for _, name := range found.Capabilities {
		has[name] = true
	}
	var missing []string
	for _, name := range capabilities {
		if !has[name] {
			missing = append(missing, name)
		}
	}
	lack := "lacks " + strings.Join(missing, ",")
	if found.ContractVersion != contractVersion {
		lack = fmt.Sprintf("speaks contract %q, not %s", found.ContractVersion, contractVersion)
	} else if len(missing) == 0 {
		return found, nil
	}
	return nil, &Error{
		Code: codes.Unimplemented, Reason: string(MethodUnimplemented),
		Info:    map[string]string{"contract_version": found.ContractVersion, "missing": strings.Join(missing, ",")},
		Message: fmt.Sprintf("the store at %s is of version %s and %s", c.target, found.ServerVersion, lack),
	}
}

// Enqueue puts rollouts into their queues, all or none.
func (c *Client) Enqueue(ctx context.Context, rollouts ...*pb.RolloutSpec) ([]*pb.Rollout, error) {
	answer, err := c.Store.EnqueueRollouts(ctx, &pb.EnqueueRolloutsRequest{RunId: c.run, Rollouts: rollouts})
	return answer.GetRollouts(), err
}

// Payload is a value as JSON; above 1 MiB it is stored as a blob.
func (c *Client) Payload(ctx context.Context, value interface{}) (*pb.Payload, error) {
	data, err := json.Marshal(value)
	if err != nil {
		return nil, err
	}
	if len(data) <= inlineBytes {
		return &pb.Payload{Content: &pb.Payload_Data{Data: data}}, nil
	}
	digest, err := c.PutBlob(ctx, data)
	return &pb.Payload{Content: &pb.Payload_BlobDigest{BlobDigest: digest}}, err
}

// Load reads a payload's JSON into a value, from its blob if need be.
func (c *Client) Load(ctx context.Context, payload *pb.Payload, into interface{}) error {
	data := payload.GetData()
	if digest := payload.GetBlobDigest(); digest != "" {
		var err error
		if data, err = c.GetBlob(ctx, digest); err != nil {
			return err
		}
	}
	if len(data) == 0 {
		return nil
	}
	return json.Unmarshal(data, into)
}

// PutBlob stores bytes under the hash of their content; answers "sha256:…".
func (c *Client) PutBlob(ctx context.Context, data []byte) (string, error) {
	hash := sha256.Sum256(data)
	digest := "sha256:" + hex.EncodeToString(hash[:])
	ctx, cancel := c.bounded(ctx)
	defer cancel()
	for tries := 0; ; tries++ {
		err := c.putBlob(ctx, digest, data)
		if err == nil || !transient(err) || !c.retry.again(ctx, err, tries) {
			return digest, err
		}
	}
}

func (c *Client) putBlob(ctx context.Context, digest string, data []byte) error {
	stream, err := c.Store.PutBlob(ctx)
	if err != nil {
		return err
	}
	err = stream.Send(&pb.PutBlobRequest{Message: &pb.PutBlobRequest_Digest{Digest: digest}})
	for len(data) > 0 && err == nil {
		size := len(data)
		if size > inlineBytes {
			size = inlineBytes
		}
		err = stream.Send(&pb.PutBlobRequest{Message: &pb.PutBlobRequest_Chunk{Chunk: data[:size]}})
		data = data[size:]
	}
	_, err = stream.CloseAndRecv() // a send that failed says EOF: the status comes here
	return err
}

// GetBlob reads a blob.
func (c *Client) GetBlob(ctx context.Context, digest string) ([]byte, error) {
	ctx, cancel := c.bounded(ctx)
	defer cancel()
	var data []byte
	open := func(ctx context.Context) (func() error, error) {
		stream, err := c.Store.GetBlob(ctx, &pb.GetBlobRequest{Digest: digest, Offset: int64(len(data))})
		return func() error {
			piece, err := stream.Recv()
			data = append(data, piece.GetChunk()...)
			return err
		}, err
	}
	err := c.resumed(ctx, open, false)
	return data, err
}

// Wait waits until all rollouts are finished (or sealed), or the context ends; unknown ids are ignored.
func (c *Client) Wait(ctx context.Context, until pb.WaitUntil, rolloutIDs ...string) ([]*pb.Rollout, error) {
	for {
		poll := longestPoll
		if deadline, ok := ctx.Deadline(); ok && time.Until(deadline) < poll {
			poll = time.Until(deadline) * 9 / 10
		}
		request := &pb.WaitRolloutsRequest{RolloutIds: rolloutIDs, Until: until, Timeout: durationpb.New(poll)}
		answer, err := c.Store.WaitRollouts(ctx, request)
		if err != nil || answer.Complete {
			return answer.GetRollouts(), err
		}
	}
}

func (c *Client) bounded(ctx context.Context) (context.Context, context.CancelFunc) {
	if _, ok := ctx.Deadline(); ok {
		return context.WithCancel(ctx)
	}
	return context.WithTimeout(ctx, c.retry.Timeout)
}

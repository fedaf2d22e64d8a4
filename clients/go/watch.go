package agl

import (
	"context"
	"io"
	"time"

	"google.golang.org/grpc"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

// resumed reads a server stream to its end, opening it again after each break: open answers a
// function that receives one message and takes note of it. An endless stream is opened again too when
// the server ends it. A store that stays away longer than the policy's Timeout ends it with an error.
func (c *Client) resumed(ctx context.Context, open func(context.Context) (func() error, error), endless bool) error {
	silentSince, tries := time.Now(), 0
	for {
		err := c.follow(ctx, open, func() { silentSince, tries = time.Now(), 0 })
		if ctx.Err() != nil {
			return typed(ctx.Err(), c.target)
		}
		switch {
		case err == io.EOF && !endless:
			return nil
		case err == io.EOF:
			pause(ctx, c.retry.FirstWait)
			continue
		case !transient(err):
			return err
		}
		if tries == 0 {
			silentSince = time.Now() // a stream may be quiet for hours before it breaks
		}
		if time.Since(silentSince) > c.retry.Timeout || !c.retry.again(ctx, err, tries) {
			return err
		}
		tries++
	}
}

func (c *Client) follow(ctx context.Context, open func(context.Context) (func() error, error), heard func()) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	receive, err := open(ctx)
	for err == nil {
		if err = receive(); err == nil {
			heard()
		}
	}
	return typed(err, c.target)
}

// start fixes "from now on", unless there is a cursor or what is there comes first: a stream that breaks
// before its first message leaves no gap.
func (c *Client) start(ctx context.Context, cursor *int64, existing bool) error {
	if *cursor != 0 || existing {
		return nil
	}
	answer, err := c.Store.GetLatestResources(ctx, &pb.GetLatestResourcesRequest{RunId: c.run})
	*cursor = answer.GetPosition()
	return err
}

func (c *Client) orOwn(run *string) {
	if *run == "" {
		*run = c.run
	}
}

// reading opens a stream of call and reads it: of each message note takes down from where to go on, then
// it is called back for. A stream that is opened again begins with the request as note has left it.
func reading[Request, Message any, Stream interface{ Recv() (Message, error) }](
	call func(context.Context, Request, ...grpc.CallOption) (Stream, error),
	request Request,
	note func(Message),
	each func(Message) error,
) func(context.Context) (func() error, error) {
	return func(ctx context.Context) (func() error, error) {
		stream, err := call(ctx, request)
		return func() error {
			message, err := stream.Recv()
			if err != nil {
				return err
			}
			note(message)
			return stopped(each(message))
		}, err
	}
}

// WatchRollouts calls back for rollouts as they change, until the context ends or the callback answers
// an error; after a break it goes on without a gap or a repeat. The request is changed to go on from.
func (c *Client) WatchRollouts(ctx context.Context, request *pb.WatchRolloutsRequest, each func(*pb.WatchRolloutsResponse) error) error {
	if err := c.start(ctx, &request.Cursor, request.IncludeExisting); err != nil {
		return err
	}
	return c.watch(ctx, reading(c.Store.WatchRollouts, request, func(message *pb.WatchRolloutsResponse) {
		// Without a cursor it is what was there already: after a break all of it comes again.
		if message.Cursor != 0 {
			request.Cursor, request.IncludeExisting = message.Cursor, false
		}
	}, each))
}

// WatchAttempts calls back for attempts as they change.
func (c *Client) WatchAttempts(ctx context.Context, request *pb.WatchAttemptsRequest, each func(*pb.WatchAttemptsResponse) error) error {
	c.orOwn(&request.RunId)
	if err := c.start(ctx, &request.Cursor, false); err != nil {
		return err
	}
	return c.watch(ctx, reading(c.Store.WatchAttempts, request, func(message *pb.WatchAttemptsResponse) {
		request.Cursor = message.Cursor
	}, each))
}

// WatchSpans calls back for spans as they arrive.
func (c *Client) WatchSpans(ctx context.Context, request *pb.WatchSpansRequest, each func(*pb.WatchSpansResponse) error) error {
	c.orOwn(&request.RunId)
	if err := c.start(ctx, &request.Cursor, false); err != nil {
		return err
	}
	return c.watch(ctx, reading(c.Store.WatchSpans, request, func(message *pb.WatchSpansResponse) {
		request.Cursor = message.Cursor
	}, each))
}

// WatchResources calls back for publications as they are made.
func (c *Client) WatchResources(ctx context.Context, request *pb.WatchResourcesRequest, each func(*pb.WatchResourcesResponse) error) error {
	c.orOwn(&request.RunId)
	if err := c.start(ctx, &request.Cursor, request.IncludeLatest); err != nil {
		return err
	}
	return c.watch(ctx, reading(c.Store.WatchResources, request, func(message *pb.WatchResourcesResponse) {
		if message.Cursor != 0 {
			request.Cursor, request.IncludeLatest = message.Cursor, false
		}
	}, each))
}

// ExportSpans calls back for the spans of many rollouts, once through.
func (c *Client) ExportSpans(ctx context.Context, request *pb.ExportSpansRequest, each func(*pb.ExportSpansResponse) error) error {
	c.orOwn(&request.RunId)
	return unwrapStop(c.resumed(ctx, reading(c.Store.ExportSpans, request, func(message *pb.ExportSpansResponse) {
		request.Cursor = message.Cursor
	}, each), false))
}

func (c *Client) watch(ctx context.Context, open func(context.Context) (func() error, error)) error {
	return unwrapStop(c.resumed(ctx, open, true))
}

// stop is the caller's own error, which ends a watch at once whatever it looks like.
type stop struct{ error }

func stopped(err error) error {
	if err == nil {
		return nil
	}
	return stop{err}
}

func unwrapStop(err error) error {
	if own, ok := err.(stop); ok {
		return own.error
	}
	return err
}

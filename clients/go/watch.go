package agl

import (
	"context"
	"io"
	"time"

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

// position fixes "from now on": a stream that breaks before its first message leaves no gap.
func (c *Client) position(ctx context.Context) (int64, error) {
	answer, err := c.Store.GetLatestResources(ctx, &pb.GetLatestResourcesRequest{RunId: c.run})
	return answer.GetPosition(), err
}

// WatchRollouts calls back for rollouts as they change, until the context ends or the callback answers
// an error; after a break it goes on without a gap or a repeat. The request is changed to go on from.
func (c *Client) WatchRollouts(ctx context.Context, request *pb.WatchRolloutsRequest, each func(*pb.WatchRolloutsResponse) error) (err error) {
	if request.Cursor == 0 && !request.IncludeExisting {
		if request.Cursor, err = c.position(ctx); err != nil {
			return err
		}
	}
	return c.watch(ctx, func(ctx context.Context) (func() error, error) {
		stream, err := c.Store.WatchRollouts(ctx, request)
		return func() error {
			message, err := stream.Recv()
			if err != nil {
				return err
			}
			// Without a cursor it is what was there already: after a break all of it comes again.
			if message.Cursor != 0 {
				request.Cursor, request.IncludeExisting = message.Cursor, false
			}
			return stopped(each(message))
		}, err
	})
}

// WatchAttempts calls back for attempts as they change.
func (c *Client) WatchAttempts(ctx context.Context, request *pb.WatchAttemptsRequest, each func(*pb.WatchAttemptsResponse) error) (err error) {
	if request.RunId == "" {
		request.RunId = c.run
	}
	if request.Cursor == 0 {
		if request.Cursor, err = c.position(ctx); err != nil {
			return err
		}
	}
	return c.watch(ctx, func(ctx context.Context) (func() error, error) {
		stream, err := c.Store.WatchAttempts(ctx, request)
		return func() error {
			message, err := stream.Recv()
			if err != nil {
				return err
			}
			request.Cursor = message.Cursor
			return stopped(each(message))
		}, err
	})
}

// WatchSpans calls back for spans as they arrive.
func (c *Client) WatchSpans(ctx context.Context, request *pb.WatchSpansRequest, each func(*pb.WatchSpansResponse) error) (err error) {
	if request.RunId == "" {
		request.RunId = c.run
	}
	if request.Cursor == 0 {
		if request.Cursor, err = c.position(ctx); err != nil {
			return err
		}
	}
	return c.watch(ctx, func(ctx context.Context) (func() error, error) {
		stream, err := c.Store.WatchSpans(ctx, request)
		return func() error {
			message, err := stream.Recv()
			if err != nil {
				return err
			}
			request.Cursor = message.Cursor
			return stopped(each(message))
		}, err
	})
}

// WatchResources calls back for publications as they are made.
func (c *Client) WatchResources(ctx context.Context, request *pb.WatchResourcesRequest, each func(*pb.WatchResourcesResponse) error) (err error) {
	if request.RunId == "" {
		request.RunId = c.run
	}
	if request.Cursor == 0 && !request.IncludeLatest {
		if request.Cursor, err = c.position(ctx); err != nil {
			return err
		}
	}
	return c.watch(ctx, func(ctx context.Context) (func() error, error) {
		stream, err := c.Store.WatchResources(ctx, request)
		return func() error {
			message, err := stream.Recv()
			if err != nil {
				return err
			}
			if message.Cursor != 0 {
				request.Cursor, request.IncludeLatest = message.Cursor, false
			}
			return stopped(each(message))
		}, err
	})
}

// ExportSpans calls back for the spans of many rollouts, once through.
func (c *Client) ExportSpans(ctx context.Context, request *pb.ExportSpansRequest, each func(*pb.ExportSpansResponse) error) error {
	if request.RunId == "" {
		request.RunId = c.run
	}
	err := c.resumed(ctx, func(ctx context.Context) (func() error, error) {
		stream, err := c.Store.ExportSpans(ctx, request)
		return func() error {
			message, err := stream.Recv()
			if err != nil {
				return err
			}
			request.Cursor = message.Cursor
			return stopped(each(message))
		}, err
	}, false)
	return unwrapStop(err)
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

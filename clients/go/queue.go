package agl

import (
	"context"
	"io"
	"sync"
)

// queue passes items from any goroutine to one reader, without a bound.
type queue struct {
	mutex  sync.Mutex
	items  []interface{}
	closed bool
	wake   chan struct{}
}

func newQueue() *queue { return &queue{wake: make(chan struct{}, 1)} }

func (q *queue) push(item interface{}) {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	if !q.closed {
		q.items = append(q.items, item)
		q.pulse()
	}
}

// close ends the queue once what was pushed has been read.
func (q *queue) close() {
	q.mutex.Lock()
	defer q.mutex.Unlock()
	q.closed = true
	q.pulse()
}

func (q *queue) pulse() {
	select {
	case q.wake <- struct{}{}:
	default:
	}
}

// next waits for an item; io.EOF at the end.
func (q *queue) next(ctx context.Context) (interface{}, error) {
	for {
		q.mutex.Lock()
		if len(q.items) > 0 {
			item := q.items[0]
			q.items = q.items[1:]
			q.mutex.Unlock()
			return item, nil
		}
		closed := q.closed
		q.mutex.Unlock()
		if closed {
			return nil, io.EOF
		}
		select {
		case <-q.wake:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

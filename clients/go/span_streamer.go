package agl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"sync"

	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	pb "github.com/agl-grpc/agl-grpc/clients/go/v1"
)

const (
	maxSpans       = 1000
	maxPartBytes   = 1 << 20
	maxSpanBytes   = 4 << 20
	maxBufferBytes = 64 << 20
)

// SpanRejection is a span that the store did not keep.
type SpanRejection struct {
	// Group is the index of the span's AttemptSpans as they were given to Send.
	Group int
	// Index is the span's place in its group; -1 = the whole group, -2 = an announcement.
	Index  int
	SpanID []byte
	Err    error
}

// SpanAck says that everything that is not in Rejected is stored, as durably as Durability tells.
type SpanAck struct {
	Durability pb.Durability
	Rejected   []SpanRejection
}

type spanPart struct {
	group      *pb.AttemptSpans
	size       int
	place      int // of the caller's group
	first      int // place of the part's first span in it
	submission *submission
}

type submission struct {
	ack   SpanAck
	parts int
	done  chan error
}

type sentMessage struct {
	sequence int64
	parts    []*spanPart
	size     int
	rejected []*pb.SpanStreamRejection
}

// SpanStreamer sends spans to the store over one stream and says when they are on disk.
//
// What is not acknowledged when the stream breaks is sent again on the next one; the store knows spans
// by their own ids, so each is kept exactly once. Sending goes on while the store is away; at most
// 64 MiB are held meanwhile, then callers wait. It may be used from any goroutine.
type SpanStreamer struct {
	ProducerID string

	client *Client
	ctx    context.Context
	cancel context.CancelFunc
	ended  chan struct{}

	mutex         sync.Mutex
	changed       *sync.Cond
	inbox         []*spanPart
	inFlight      []*sentMessage
	buffered      int
	inFlightBytes int
	sequence      int64
	acknowledged  int
	err           error
	session       int // number of the stream; a writer of an older one stops
	draining      bool
}

// Spans starts a producer of spans. Two with one producer id fence each other; "" = a new one.
func (c *Client) Spans(producerID string) *SpanStreamer {
	if producerID == "" {
		producerID = "go-" + newID()
	}
	ctx, cancel := context.WithCancel(context.Background())
	s := &SpanStreamer{ProducerID: producerID, client: c, ctx: ctx, cancel: cancel, ended: make(chan struct{})}
	s.changed = sync.NewCond(&s.mutex)
	go s.run()
	return s
}

// Send sends spans and waits until they are on disk; first it waits for room in the buffer. It fails
// with StreamFenced when another streamer took the producer id over. A context that ends takes nothing back.
func (s *SpanStreamer) Send(ctx context.Context, groups ...*pb.AttemptSpans) (SpanAck, error) {
	one := &submission{done: make(chan error, 1)}
	var parts []*spanPart
	size := 0
	for place, group := range groups {
		for _, part := range splitGroup(group) {
			part.place, part.submission = place, one
			if part.size > maxSpanBytes {
				one.ack.Rejected = append(one.ack.Rejected, tooLarge(part))
				continue
			}
			parts = append(parts, part)
			size += part.size
		}
	}
	if len(parts) == 0 {
		return one.ack, nil
	}
	one.parts = len(parts)
	if err := s.take(parts, size); err != nil {
		return SpanAck{}, err
	}
	select {
	case err := <-one.done:
		return one.ack, err
	case <-ctx.Done():
		return SpanAck{}, ctx.Err()
	}
}

func (s *SpanStreamer) take(parts []*spanPart, size int) error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for s.err == nil && s.buffered > 0 && s.buffered+size > maxBufferBytes {
		s.changed.Wait()
	}
	if s.err != nil {
		return s.err
	}
	s.buffered += size
	s.inbox = append(s.inbox, parts...)
	s.changed.Broadcast()
	return nil
}

// Close waits until everything is settled and stops; when the context ends before, what is left is
// given up, with an error.
func (s *SpanStreamer) Close(ctx context.Context) error {
	done := make(chan error, 1)
	go func() { done <- s.flush() }()
	var err error
	select {
	case err = <-done:
	case <-ctx.Done():
		s.mutex.Lock()
		err = fmt.Errorf("%d bytes of spans were not stored in time and are given up: %w", s.buffered, ctx.Err())
		s.mutex.Unlock()
	}
	s.cancel()
	s.fail(errors.New("the SpanStreamer is closed"))
	<-s.ended
	return err
}

func (s *SpanStreamer) flush() error {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for s.err == nil && len(s.inbox)+len(s.inFlight) > 0 {
		s.changed.Wait()
	}
	return s.err
}

func (s *SpanStreamer) fail(err error) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	if s.err == nil {
		s.err = err
	}
	for _, sent := range s.inFlight {
		s.inbox = append(s.inbox, sent.parts...)
	}
	for _, part := range s.inbox {
		select {
		case part.submission.done <- s.err:
		default: // told already
		}
	}
	s.inbox, s.inFlight, s.buffered = nil, nil, 0
	s.changed.Broadcast()
}

func (s *SpanStreamer) run() {
	defer close(s.ended)
	for tries, refusals := 0, 0; s.ctx.Err() == nil; tries++ {
		before := s.settled()
		opened, err := s.follow()
		if s.ctx.Err() != nil {
			return
		}
		if opened {
			tries = 0
		}
		refusals++
		if err == io.EOF || transient(err) || s.settled() > before {
			refusals = 0
		}
		if errors.Is(err, StreamFenced) || refusals >= triesOfARefusedStream {
			s.fail(err)
			return
		}
		s.client.retry.again(s.ctx, err, tries)
	}
}

func (s *SpanStreamer) settled() int {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	return s.acknowledged
}

func (s *SpanStreamer) follow() (opened bool, err error) {
	ctx, cancel := context.WithCancel(s.ctx)
	defer cancel()
	session := s.begin()
	defer s.begin() // a writer of this stream stops
	stream, err := s.client.Store.StreamSpans(ctx)
	if err != nil {
		return false, err
	}
	open := &pb.SpanStreamOpen{ProducerId: s.ProducerID, Resume: true}
	_ = stream.Send(&pb.StreamSpansRequest{Message: &pb.StreamSpansRequest_Open{Open: open}}) // Recv has the status
	for {
		response, err := stream.Recv()
		if err != nil {
			return opened, err
		}
		switch message := response.Message.(type) {
		case *pb.StreamSpansResponse_Opened:
			opened = true
			go s.write(stream, message.Opened, session)
		case *pb.StreamSpansResponse_Ack:
			s.settle(message.Ack)
		case *pb.StreamSpansResponse_Drain:
			s.mutex.Lock()
			s.draining = true
			s.changed.Broadcast()
			s.mutex.Unlock()
		}
	}
}

func (s *SpanStreamer) begin() int {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	s.session++
	s.draining = false
	for _, sent := range s.inFlight {
		sent.sequence = 0 // not on this stream yet
	}
	s.changed.Broadcast()
	return s.session
}

func (s *SpanStreamer) write(stream pb.StoreService_StreamSpansClient, opened *pb.SpanStreamOpened, session int) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	// Numbers begin anew: a message is answered for again, so that no rejection is lost with its ack.
	if opened.LastSequence > s.sequence {
		s.sequence = opened.LastSequence
	}
	current := func() bool { return s.session == session && !s.draining && s.err == nil }
	for _, sent := range append([]*sentMessage(nil), s.inFlight...) {
		sent.rejected = nil
		if !current() || !s.put(stream, sent) {
			return
		}
	}
	for current() {
		if len(s.inbox) == 0 || !s.fits(opened) {
			s.changed.Wait()
			continue
		}
		sent := s.nextMessage()
		s.inFlight = append(s.inFlight, sent)
		s.inFlightBytes += sent.size
		if !s.put(stream, sent) {
			return
		}
	}
	if s.session == session {
		_ = stream.CloseSend() // the reader of the same call learns its status
	}
}

// put sends without the lock, so that acknowledgements are read meanwhile.
func (s *SpanStreamer) put(stream pb.StoreService_StreamSpansClient, sent *sentMessage) bool {
	s.sequence++
	sent.sequence = s.sequence
	message := &pb.SpanStreamMessage{Sequence: sent.sequence}
	for _, part := range sent.parts {
		message.Groups = append(message.Groups, part.group)
	}
	s.mutex.Unlock()
	defer s.mutex.Lock()
	return stream.Send(&pb.StreamSpansRequest{Message: &pb.StreamSpansRequest_Spans{Spans: message}}) == nil
}

func (s *SpanStreamer) fits(opened *pb.SpanStreamOpened) bool {
	if len(s.inFlight) == 0 {
		return true
	}
	if most := opened.MaxInFlightBytes; most > 0 && int64(s.inFlightBytes+s.inbox[0].size) > most {
		return false
	}
	return opened.MaxInFlightMessages == 0 || len(s.inFlight) < int(opened.MaxInFlightMessages)
}

func (s *SpanStreamer) nextMessage() *sentMessage {
	sent, spans := &sentMessage{}, 0
	for _, part := range s.inbox {
		spans += len(part.group.Spans)
		if len(sent.parts) > 0 && (sent.size+part.size > maxPartBytes || spans > maxSpans) {
			break
		}
		sent.parts = append(sent.parts, part)
		sent.size += part.size
	}
	s.inbox = s.inbox[len(sent.parts):]
	return sent
}

func (s *SpanStreamer) settle(ack *pb.SpanStreamAck) {
	s.mutex.Lock()
	defer s.mutex.Unlock()
	for _, rejected := range ack.Rejected {
		for _, sent := range s.inFlight {
			if sent.sequence == rejected.Sequence {
				sent.rejected = append(sent.rejected, rejected)
			}
		}
	}
	for len(s.inFlight) > 0 && s.inFlight[0].sequence > 0 && s.inFlight[0].sequence <= ack.Sequence {
		sent := s.inFlight[0]
		s.inFlight = s.inFlight[1:]
		s.inFlightBytes -= sent.size
		s.acknowledged++
		for _, rejected := range sent.rejected {
			sent.parts[rejected.Span.GroupIndex].reject(rejected.Span)
		}
		for _, part := range sent.parts {
			s.buffered -= part.size
			part.settle(ack.Durability)
		}
	}
	s.changed.Broadcast()
}

func (p *spanPart) reject(span *pb.RejectedSpan) {
	index := int(span.Index)
	if index >= 0 {
		index += p.first
	}
	rejection := SpanRejection{Group: p.place, Index: index, SpanID: span.SpanId, Err: itemError(span.Status)}
	p.submission.ack.Rejected = append(p.submission.ack.Rejected, rejection)
}

func (p *spanPart) settle(durability pb.Durability) {
	one := p.submission
	// The weakest promise among the parts is the one that holds.
	if one.ack.Durability == pb.Durability_DURABILITY_UNSPECIFIED || durability < one.ack.Durability {
		one.ack.Durability = durability
	}
	if one.parts--; one.parts == 0 {
		one.done <- nil
	}
}

// splitGroup cuts a group into parts that fit into one message each; announcements go with the first.
func splitGroup(group *pb.AttemptSpans) []*spanPart {
	overhead := len(group.RolloutId) + len(group.AttemptId) + 32*(len(group.OpenCalls)+len(group.AbandonedCalls)+1)
	var parts []*spanPart
	cut := func(from, to, bytes int) {
		piece := &pb.AttemptSpans{RolloutId: group.RolloutId, AttemptId: group.AttemptId, Spans: group.Spans[from:to]}
		if len(parts) == 0 {
			piece.OpenCalls, piece.AbandonedCalls = group.OpenCalls, group.AbandonedCalls
		}
		parts = append(parts, &spanPart{group: piece, size: bytes + overhead, first: from})
	}
	from, bytes := 0, 0
	for index, span := range group.Spans {
		size := proto.Size(span)
		if index > from && (bytes+size > maxPartBytes || index-from >= maxSpans) {
			cut(from, index, bytes)
			from, bytes = index, 0
		}
		bytes += size
	}
	if from < len(group.Spans) || len(parts) == 0 {
		cut(from, len(group.Spans), bytes)
	}
	return parts
}

func tooLarge(part *spanPart) SpanRejection {
	message := fmt.Sprintf("spans[%d] has %d bytes; at most %d are allowed: leave long values out", part.first, part.size, maxSpanBytes)
	rejection := SpanRejection{Group: part.place, Index: part.first, Err: &Error{Code: codes.InvalidArgument, Reason: string(InvalidField), Message: message}}
	if len(part.group.Spans) > 0 {
		rejection.SpanID = part.group.Spans[0].SpanId
	}
	return rejection
}

package ipc

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"unicode/utf8"
)

const (
	// MaxTopic is the longest name of a topic in bytes.
	MaxTopic = 255
	// MaxPublish is the longest message that can be published, in bytes.
	MaxPublish = 1 << 20
	// MaxSubscriptions is how many subscriptions one worker may have.
	MaxSubscriptions = 256

	defaultBuffer      = 256
	defaultBufferBytes = 8 << 20
)

var (
	// ErrTopic says that a name is none of a topic, or not one to publish to.
	ErrTopic = errors.New("ipc: not a topic")
	// ErrSlow says that a subscription has ended because its messages were not
	// received fast enough.
	ErrSlow = errors.New("ipc: the subscriber is too slow")
)

// SlowPolicy says what becomes of messages that a subscriber has no room for.
type SlowPolicy uint8

// The policies.
const (
	DropOldest SlowPolicy = iota // the oldest makes room
	DropNewest                   // the new one is dropped
	Disconnect                   // the subscription ends; a worker's channel too
)

// Topics is a bus: what is published under a topic goes to all who have
// subscribed to it then. It never waits for a subscriber. All subscribers get
// the messages in one order, that of the calls of Publish. It has no goroutine
// and is safe for use by several.
type Topics struct {
	mu     sync.Mutex
	exact  map[string]map[*mailbox]struct{}
	prefix map[string]map[*mailbox]struct{}
	round  uint64
}

// NewTopics makes a bus.
func NewTopics() *Topics {
	return &Topics{exact: make(map[string]map[*mailbox]struct{}), prefix: make(map[string]map[*mailbox]struct{})}
}

// Message is one that was published.
type Message struct {
	Topic string
	Body  []byte // shared by all who receive it: not to be changed
	// Dropped is how many messages this subscriber has missed since the one
	// before.
	Dropped uint64
}

// SubscribeOptions are the settings of a subscription. The zero value is useful.
type SubscribeOptions struct {
	Buffer int        // messages that wait to be received; 0: 256
	Bytes  int        // of all that wait; one may always wait. 0: 8 MiB
	Slow   SlowPolicy // what happens when either is too little
}

// Subscription is one subscriber. One goroutine may call Receive; Close may be
// called from any.
type Subscription struct {
	t       *Topics
	pattern string
	box     mailbox
}

// checkTopic checks a name; one to subscribe to may end in "*".
func checkTopic(name string, pattern bool) error {
	switch {
	case name == "" || len(name) > MaxTopic:
		return fmt.Errorf("%w: a name of %d bytes, where 1 to %d are possible", ErrTopic, len(name), MaxTopic)
	case !utf8.ValidString(name):
		return fmt.Errorf("%w: %q is not UTF-8", ErrTopic, name)
	case !pattern && name[len(name)-1] == '*':
		return fmt.Errorf("%w: %q: a name that ends in * can be subscribed to only", ErrTopic, name)
	}
	return nil
}

// Publish gives body, which must not be changed any more, to all who have
// subscribed to topic. Errors: ErrTopic; ErrTooLarge for more than MaxPublish
// bytes.
func (t *Topics) Publish(topic string, body []byte) error {
	if err := checkTopic(topic, false); err != nil {
		return err
	}
	if len(body) > MaxPublish {
		return fmt.Errorf("%w: a message of %d bytes, where %d are allowed", ErrTooLarge, len(body), MaxPublish)
	}
	t.Forward(Message{Topic: topic, Body: body})
	return nil
}

// Forward publishes a message that was received elsewhere: its subscribers are
// told what was dropped there. It must be one that Publish would take.
func (t *Topics) Forward(m Message) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.round++
	give := func(boxes map[*mailbox]struct{}) {
		for b := range boxes {
			if b.round != t.round { // else it has it by another name
				b.round = t.round
				b.put(m)
			}
		}
	}
	give(t.exact[m.Topic])
	if len(t.prefix) > 0 {
		for n := 0; n <= len(m.Topic); n++ {
			give(t.prefix[m.Topic[:n]])
		}
	}
}

// Subscribe subscribes to a topic, or with a "*" at the end to all whose names
// begin with what precedes it. The caller must Close the subscription. Error:
// ErrTopic.
func (t *Topics) Subscribe(topic string, o SubscribeOptions) (*Subscription, error) {
	if err := checkTopic(topic, true); err != nil {
		return nil, err
	}
	s := &Subscription{t: t, pattern: topic}
	s.box.init(o)
	t.add(topic, &s.box)
	return s, nil
}

// Receive returns the next message. It waits for one until ctx ends. The other
// errors are ErrSlow and, after Close, ErrClosed.
func (s *Subscription) Receive(ctx context.Context) (Message, error) {
	for {
		m, ok, err := s.box.get()
		if ok || err != nil {
			return m, err
		}
		select {
		case <-s.box.wake:
		case <-ctx.Done():
			return Message{}, fmt.Errorf("ipc: no message: %w", ctx.Err())
		}
	}
}

// Dropped is how many messages this subscriber has missed so far.
func (s *Subscription) Dropped() uint64 {
	s.box.mu.Lock()
	defer s.box.mu.Unlock()
	return s.box.total
}

// Close ends the subscription.
func (s *Subscription) Close() {
	s.t.remove(s.pattern, &s.box)
	s.box.close(ErrClosed)
}

// side returns the set of subscribers that a pattern belongs to.
func (t *Topics) side(pattern string) (map[string]map[*mailbox]struct{}, string) {
	if n := len(pattern) - 1; pattern[n] == '*' {
		return t.prefix, pattern[:n]
	}
	return t.exact, pattern
}

func (t *Topics) add(pattern string, b *mailbox) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m, name := t.side(pattern)
	if m[name] == nil {
		m[name] = make(map[*mailbox]struct{})
	}
	m[name][b] = struct{}{}
}

func (t *Topics) remove(pattern string, b *mailbox) {
	t.mu.Lock()
	defer t.mu.Unlock()
	m, name := t.side(pattern)
	delete(m[name], b)
	if len(m[name]) == 0 {
		delete(m, name)
	}
}

// mailbox holds what waits for a subscriber.
type mailbox struct {
	round uint64 // guarded by Topics.mu
	wake  chan struct{}
	slow  func(error) // told that it has ended for being slow; may be nil

	mu      sync.Mutex
	o       SubscribeOptions
	queue   []Message // from first on
	first   int
	bytes   int
	dropped uint64 // behind what is in the queue
	total   uint64
	err     error
}

func (b *mailbox) init(o SubscribeOptions) {
	if o.Buffer <= 0 {
		o.Buffer = defaultBuffer
	}
	if o.Bytes <= 0 {
		o.Bytes = defaultBufferBytes
	}
	b.o, b.wake = o, make(chan struct{}, 1)
}

func (b *mailbox) put(m Message) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.err != nil {
		return
	}
	b.dropped += m.Dropped
	b.total += m.Dropped
	cost := len(m.Topic) + len(m.Body)
	for b.len() > 0 && (b.len() == b.o.Buffer || b.bytes+cost > b.o.Bytes) {
		switch b.o.Slow {
		case DropNewest:
			b.total++
			b.dropped++
			return
		case Disconnect:
			b.end(fmt.Errorf("%w: %d messages wait", ErrSlow, b.len()))
			if b.slow != nil {
				go b.slow(b.err)
			}
			return
		default:
			b.total++
			if lost := 1 + b.pop().Dropped; b.len() > 0 {
				b.queue[b.first].Dropped += lost
			} else {
				b.dropped += lost
			}
		}
	}
	m.Dropped, b.dropped = b.dropped, 0
	if b.first > 0 && len(b.queue) == cap(b.queue) {
		n := copy(b.queue, b.queue[b.first:])
		clear(b.queue[n:])
		b.queue, b.first = b.queue[:n], 0
	}
	b.queue = append(b.queue, m)
	b.bytes += cost
	b.signal()
}

func (b *mailbox) len() int { return len(b.queue) - b.first }

func (b *mailbox) pop() Message {
	m := b.queue[b.first]
	b.queue[b.first] = Message{}
	b.bytes -= len(m.Topic) + len(m.Body)
	if b.first++; b.first == len(b.queue) {
		b.queue, b.first = nil, 0
	}
	return m
}

func (b *mailbox) get() (Message, bool, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.len() == 0 {
		return Message{}, false, b.err
	}
	return b.pop(), true, nil
}

func (b *mailbox) signal() {
	select {
	case b.wake <- struct{}{}:
	default:
	}
}

func (b *mailbox) end(err error) {
	if b.err == nil {
		b.err = err
	}
	b.queue, b.first, b.bytes = nil, 0, 0
	b.signal()
}

func (b *mailbox) close(err error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.end(err)
}

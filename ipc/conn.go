package ipc

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math"
	"os"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/internal/fdpass"
)

// Conn is the parent's end of one worker's channel. Serve is called once;
// everything else may be called from any goroutine, also from a Receiver's
// methods, and does not wait for the worker.
//
// Files that came with an answer are in [Request.Got] when its Receiver is told
// the end, which owns them then.
type Conn interface {
	// Serve reads until the channel ends and hands on what arrives. ready is
	// called once, when the worker is ready for tasks. Every request that is
	// under way at the end is ended with ErrClosed before Serve returns. The
	// error is nil where the worker closed the channel between two messages,
	// else it says what was wrong; ErrProtocol and ErrTooLarge are the
	// worker's fault.
	Serve(ready func()) error
	// Start sends a request. Unless it returns an error, the request's
	// Receiver is told its end exactly once, which may be before Start
	// returns.
	Start(r *Request) error
	// Cancel tells the worker that the answer is not wanted any more; the
	// request still ends by an answer. False: there is no way to tell it.
	Cancel(r *Request) bool
	// Ping asks for a sign of life, and Heard counts those that came. False:
	// there is no way to ask.
	Ping() bool
	Heard() uint64
	// Stop asks the worker to finish what it has and end.
	Stop()
	// Close ends the channel at once.
	Close()
}

// Receiver is told what becomes of a request. The calls come one after the
// other from the goroutine in Serve and must be quick: they hold up the
// worker's other answers. What they are given is theirs to keep.
type Receiver interface {
	// End is the last call. err is a *TaskError where the worker reported a
	// failure, wraps ErrClosed where the channel ended first.
	End(r *Request, body []byte, err error)
	Progress(r *Request, body []byte)
	Chunk(r *Request, body []byte)
}

// Request is one task for a worker. The exported fields are set before Start
// and not changed until the end; a request may be started again after its end.
type Request struct {
	Name    string        // at most 1 KiB; frames only
	Body    []byte        // JSON for all but frames
	Timeout time.Duration // told to the worker; 0: none
	// Files go along; they are duplicated before Start returns and stay the
	// caller's. Frames take MaxFiles, Node takes one.
	Files []*os.File
	To    Receiver
	Wait  bool // the caller will call Await, where the Conn has it

	// Buffer is the one that Body lies in, where that is so: a worker that shares
	// memory gets it as it is. It must not be changed until the end.
	Buffer *Buffer
	// Share has End given a body that lies in the worker's memory, where it
	// comes so: Release must be called then, and until then the worker can
	// change it.
	Share bool

	// Of the answer, set before End:
	Release func()        // not nil where the body is the worker's memory
	Got     []*os.File    // what came along; the Receiver's own
	Took    time.Duration // in the worker's handler, as it says; 0: not told

	id        uint32
	lease     *Lease // of what it was sent in
	sent      bool
	cancelled bool
}

// Reset makes a request that has ended ready to be started again.
func (r *Request) Reset() {
	r.id, r.sent, r.cancelled = 0, false, false
	r.Got, r.Took, r.Release = nil, 0, nil
}

// Options bound what a Conn takes. The zero value is useful.
type Options struct {
	MaxMessage  int // bytes of one message's payload; 0: DefaultMaxFrame
	MaxQueued   int // bytes that wait for the worker; 0: DefaultMaxQueued
	Concurrency int // told to frames workers: tasks under way at a time

	// Shared is from how many bytes on bodies travel in shared memory, to frames
	// workers that take them so, and from them. 0: DefaultShared; below 0: none
	// do.
	Shared int

	// Topics is what frames workers publish to and subscribe to. Nil: what they
	// publish goes nowhere, and they hear nothing.
	Topics *Topics

	// NodeChannel is for frames workers that are programs of Node: the parent's
	// end of a second Pair, whose other end the worker has as NodeEnv says, for
	// descriptors, which it cannot take otherwise. NewFrames takes it over,
	// unless it fails. Nil: such a worker gets none.
	NodeChannel *os.File

	// OnMessage is given what a Node program sends while no task is under way,
	// with the handle that came along or nil; both are its own. The calls come
	// one after the other from the goroutine in Serve. Nil: dropped.
	OnMessage func(msg json.RawMessage, f *os.File)
	// MaxUnsolicited is how many such messages a second a Node program may
	// send, and how often a second a frames worker may publish, subscribe and
	// unsubscribe; more is a violation of the protocol. 0: DefaultMaxUnsolicited;
	// below 0: any number.
	MaxUnsolicited int
	// HealthCheck makes Ping ask a Node program by {"type":"health_check"} and
	// takes the {"type":"health_check_response"} that comes back for a sign of
	// life, not for an answer or a message.
	HealthCheck bool
}

// busyFrom is from how many requests under way on sends are gathered.
const busyFrom = 4

// frames is the parent's side of the frames protocol.
type frames struct {
	ch *Channel

	mu      sync.Mutex
	pending map[uint32]*Request
	last    uint32
	ready   bool
	err     error // set once the channel has ended
	fatal   error // why it was ended from here
	pings   uint32
	lead    lead
	side    side
	gather  gather

	subs subscriber // of the one that reads
}

// NewFrames speaks the frames protocol over f, the parent's end of a Pair,
// which it takes over unless it fails.
func NewFrames(f *os.File, o Options) (Conn, error) {
	ch, err := NewChannel(f, ChannelOptions{MaxFrame: o.MaxMessage, MaxQueued: o.MaxQueued, Shared: o.Shared})
	if err != nil {
		return nil, err
	}
	ch.parent = true
	// Queued now, so that it is the first frame whatever is called next.
	hello := AppendHello(nil, Hello{Remuda: Version, MaxFrame: ch.r.limit, Concurrency: o.Concurrency, Files: true, Shared: ch.from})
	if err := ch.w.queue(hello, nil); err != nil {
		return nil, err
	}
	c := &frames{ch: ch, pending: make(map[uint32]*Request)}
	if c.side, err = newSide(o.NodeChannel); err != nil {
		return nil, err
	}
	c.lead.init(&c.mu, ch.sock)
	c.subs.init(c, o)
	c.gather.flush = func() {
		c.mu.Lock()
		c.gather.waited()
		c.mu.Unlock()
		c.ch.w.flush(false)
	}
	return c, nil
}

func (c *frames) Serve(ready func()) error {
	c.ch.w.flush(false)
	var err error
	for err == nil {
		if err = c.turn(ready); err == nil {
			err = c.lead.lend(c.underWay)
		}
	}
	switch {
	case errors.Is(err, io.EOF) || errors.Is(err, os.ErrClosed):
		err = nil
	case errors.Is(err, ErrClosed) && isClosed(err):
		err = nil
	}
	c.mu.Lock()
	if c.fatal != nil {
		err = c.fatal
	}
	c.err = closedBy(err)
	left := c.pending
	c.pending = nil
	c.mu.Unlock()
	c.ch.Close()
	c.subs.end()
	c.endSide()
	for _, r := range left {
		r.lease.End()
		r.To.End(r, nil, c.err)
	}
	return err
}

func (c *frames) underWay() int { return len(c.pending) }

// Await implements Awaiter.
func (c *frames) Await(r *Request) { c.lead.await(r, c.underWay, c.poll) }

// poll is turn for one that cannot wait.
func (c *frames) poll() error {
	if err := c.ch.poll(); err != nil {
		return err
	}
	return c.turn(nil) // HELLO has come, else nothing could have been lent
}

// turn handles what has arrived.
func (c *frames) turn(ready func()) error {
	f, owned, more, err := c.ch.Receive()
	if err != nil {
		return err
	}
	c.ch.Hold()
	defer func() {
		c.mu.Lock()
		c.gather.turned(len(c.pending), time.Now())
		c.mu.Unlock()
		c.ch.Release()
	}()
	for {
		if err := c.handle(f, owned, ready); err != nil || !more {
			return err
		}
		if f, owned, more, err = c.ch.Receive(); err != nil {
			return err
		}
	}
}

func (c *frames) handle(f Frame, owned bool, ready func()) error {
	if (f.Files != nil || f.Shared != nil) && f.Type != TypeResult {
		f.drop()
		return fmt.Errorf("%w: descriptors or shared memory with a frame %s of a worker", ErrProtocol, f.Type)
	}
	if !c.ready && f.Type != TypeHello {
		return fmt.Errorf("%w: the worker's first frame is %s, not HELLO", ErrProtocol, f.Type)
	}
	keep := func() []byte {
		if owned || len(f.Payload) == 0 {
			return f.Payload
		}
		return append([]byte(nil), f.Payload...)
	}
	switch f.Type {
	case TypeHello:
		if c.ready {
			return fmt.Errorf("%w: a second HELLO", ErrProtocol)
		}
		h, err := ParseHello(f.Payload)
		if err != nil {
			return err
		}
		c.ready = true
		c.ch.SetPeer(h)
		c.mu.Lock()
		c.side.up = h.Handles && c.side.conn != nil
		c.mu.Unlock()
		if ready != nil {
			ready()
		}
	case TypeResult, TypeError:
		c.mu.Lock()
		r := c.pending[f.ID]
		delete(c.pending, f.ID)
		c.mu.Unlock()
		if r == nil {
			f.drop()
			return fmt.Errorf("%w: %s for %d, which is no task under way", ErrProtocol, f.Type, f.ID)
		}
		r.lease.End()
		r.Got, r.Took = f.Files, f.Took
		c.lead.ended(r)
		if f.Type == TypeResult {
			switch {
			case f.Shared == nil:
				r.To.End(r, keep(), nil)
			case r.Share:
				r.Release = f.Shared.Release
				r.To.End(r, f.Shared.Bytes, nil)
			default:
				body := append([]byte(nil), f.Shared.Bytes...)
				f.Shared.Release()
				r.To.End(r, body, nil)
			}
			return nil
		}
		e, err := ParseError(f.Payload)
		if err != nil {
			r.To.End(r, nil, fmt.Errorf("%w: %w", ErrClosed, err))
			return err
		}
		r.To.End(r, nil, e)
	case TypeProgress, TypeChunk:
		c.mu.Lock()
		r := c.pending[f.ID]
		c.mu.Unlock()
		if r == nil {
			return fmt.Errorf("%w: %s for %d, which is no task under way", ErrProtocol, f.Type, f.ID)
		}
		// Others' sends must not wait for what the receiver does here.
		c.ch.Release()
		if f.Type == TypeProgress {
			r.To.Progress(r, keep())
		} else {
			r.To.Chunk(r, keep())
		}
		c.ch.Hold()
	case TypePing:
		return c.ch.Send(TypePong, f.ID, keep())
	case TypePong, TypeSegment, TypeForget:
	case TypeSubscribe, TypeUnsubscribe, TypePublish:
		return c.subs.handle(f)
	default:
		if !f.Type.Optional() {
			return fmt.Errorf("%w: unexpected frame %s from a worker", ErrProtocol, f.Type)
		}
	}
	return nil
}

func (c *frames) Start(r *Request) error {
	if len(r.Name) > maxName {
		return fmt.Errorf("%w: a task name of %d bytes, where %d are allowed", ErrTooLarge, len(r.Name), maxName)
	}
	if int64(len(r.Body)) > c.ch.peer.Load() {
		return c.ch.tooLarge(len(r.Body))
	}
	if len(r.Body) > math.MaxUint32-taskHeader-maxName {
		return fmt.Errorf("%w: %d bytes", ErrTooLarge, len(r.Body))
	}
	var fds []int
	var handles []outbound
	if len(r.Files) > 0 {
		c.mu.Lock()
		bySide := c.side.up
		c.mu.Unlock()
		var err error
		if bySide {
			handles, fds, err = c.side.duplicate(r.Files)
		} else {
			fds, err = c.ch.dup(r.Files)
		}
		if err != nil {
			return err
		}
	}
	body, l := r.Body, c.ch.share(r.Body, nil, r.Buffer)
	if l != nil {
		body = nil
	}
	var space [160]byte
	c.mu.Lock()
	if c.err != nil || r.cancelled {
		err := c.err
		c.mu.Unlock()
		fdpass.Close(fds)
		l.End()
		if err == nil {
			err = ErrCancelled
		}
		return err
	}
	for {
		c.last++
		if _, used := c.pending[c.last]; !used && c.last != 0 {
			break
		}
	}
	// Queued under the lock, so that a cancel comes after it.
	head := appendShared(appendHandles(space[:0], c.last, fds), c.last, l)
	head = appendTask(head, c.last, r.Name, r.Timeout, len(body))
	if handles != nil {
		fds = nil // the side channel's from now on
		if err := c.sendHandles(c.last, handles); err != nil {
			c.mu.Unlock()
			l.End()
			c.side.conn.w.flush(false)
			c.ch.w.flush(false)
			return err
		}
	}
	if err := c.ch.w.queueFDs(head, body, fds); err != nil {
		c.mu.Unlock()
		l.End()
		return err
	}
	r.id, r.sent, r.lease = c.last, true, l
	c.pending[r.id] = r
	c.lead.started(r)
	kept := c.gather.keep(len(c.pending)) && handles == nil
	busy := c.gather.busy()
	c.mu.Unlock()
	if kept {
		return nil
	}
	if handles != nil {
		c.side.conn.w.flush(false)
	}
	c.ch.w.flush(busy)
	return nil
}

func (c *frames) Cancel(r *Request) bool {
	c.mu.Lock()
	r.cancelled = true
	if !r.sent || c.pending[r.id] != r {
		c.mu.Unlock()
		return true
	}
	var head [HeaderSize]byte
	err := c.ch.w.queue(AppendHeader(head[:0], TypeCancel, r.id, 0), nil)
	c.mu.Unlock()
	c.ch.w.flush(false)
	return err == nil
}

func (c *frames) Ping() bool {
	c.mu.Lock()
	c.pings++
	id := c.pings
	c.mu.Unlock()
	return c.ch.Send(TypePing, id, nil) == nil
}

func (c *frames) Heard() uint64 { return c.ch.in.heard.Load() }

func (c *frames) Stop() { _ = c.ch.Send(TypeStop, 0, nil) } // closed: it ends anyway

func (c *frames) Close() {
	c.ch.Close()
	if c.side.conn != nil {
		c.side.conn.Close()
	}
}

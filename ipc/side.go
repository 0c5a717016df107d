package ipc

import (
	"fmt"
	"os"
)

// side brings descriptors to a frames worker that is a Node program: Node takes
// none from an ordinary socket, but it does from its own channel, which such a
// worker has beside that of the frames. It is read from the first use on.
type side struct {
	conn *NodeConn     // nil: there is none
	up   bool          // the worker's hello says that it takes handles there
	done chan struct{} // closed when it has been read to its end; nil: not begun
}

func newSide(f *os.File) (side, error) {
	if f == nil {
		return side{}, nil
	}
	conn, err := NewNode(f, Options{})
	return side{conn: conn}, err
}

// duplicate returns duplicates of files as messages of the side channel, and
// their descriptors.
func (s *side) duplicate(files []*os.File) (ms []outbound, fds []int, err error) {
	if len(files) > MaxFiles {
		return nil, nil, fmt.Errorf("%w: %d descriptors, where %d are allowed", ErrTooLarge, len(files), MaxFiles)
	}
	for _, f := range files {
		h, err := newHandle(f, false)
		if err != nil {
			closeHandles(ms)
			return nil, nil, err
		}
		ms, fds = append(ms, outbound{handle: h}), append(fds, h.fds...)
	}
	return ms, fds, nil
}

func closeHandles(ms []outbound) {
	for i := range ms {
		ms[i].handle.close()
	}
}

// sendHandles queues the handles of the task id, which it takes over; c.mu is
// held. side.conn is to be flushed then.
func (c *frames) sendHandles(id uint32, ms []outbound) error {
	if c.side.done == nil {
		c.side.done = make(chan struct{})
		go c.serveSide()
	}
	for i := range ms {
		m := &ms[i]
		// A server is given bare: what it accepted before the handler is called
		// would be lost.
		server := m.handle.kind == "net.Server"
		if server {
			m.handle.kind = "net.Native"
		}
		m.msg = fmt.Appendf(nil, `{"remuda":[%d,%d,%t]}`, id, i, server)
		if _, err := c.side.conn.put(m); err != nil {
			closeHandles(ms[i:])
			// The worker need not keep those that did go out.
			var head [HeaderSize]byte
			_ = c.ch.w.queue(AppendHeader(head[:0], TypeCancel, id, 0), nil)
			return err
		}
	}
	return nil
}

// serveSide reads the side channel. Its end is the worker's: a task whose handle
// cannot come would wait for ever.
func (c *frames) serveSide() {
	defer close(c.side.done)
	if err := c.side.conn.Serve(nil); err != nil {
		c.mu.Lock()
		if c.fatal == nil && c.err == nil {
			c.fatal = err
		}
		c.mu.Unlock()
	}
	c.ch.Close()
}

// endSide closes the side channel and waits for its reader.
func (c *frames) endSide() {
	if c.side.conn == nil {
		return
	}
	c.side.conn.Close()
	c.mu.Lock()
	done := c.side.done
	c.mu.Unlock()
	if done != nil {
		<-done
	}
}

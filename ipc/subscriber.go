package ipc

import (
	"fmt"
	"math"
	"sync"
)

// pumpRoom is how many bytes may wait to be written before messages that were
// published wait in the worker's mailbox, where its policy rules.
const pumpRoom = 256 << 10

// subscriber is a worker on a bus. All but the pump is of the goroutine in
// Serve.
type subscriber struct {
	c      *frames
	topics *Topics
	rate   rate
	names  map[string]struct{}
	box    *mailbox // from the first subscription on
	pump   sync.WaitGroup
}

func (s *subscriber) init(c *frames, o Options) {
	s.c, s.topics, s.rate = c, o.Topics, rate{limit: o.MaxUnsolicited}
	if s.rate.limit == 0 {
		s.rate.limit = DefaultMaxUnsolicited
	}
}

// handle does what a SUBSCRIBE, UNSUBSCRIBE or PUBLISH frame asks for.
func (s *subscriber) handle(f Frame) error {
	if err := s.rate.take(); err != nil {
		return err
	}
	switch f.Type {
	case TypePublish:
		topic, body, err := ParsePublish(f.Payload)
		if err != nil {
			return err
		}
		if s.topics != nil {
			s.topics.Forward(Message{Topic: topic, Body: append([]byte(nil), body...)})
		}
	case TypeSubscribe:
		if len(f.Payload) == 0 || SlowPolicy(f.Payload[0]) > Disconnect {
			return fmt.Errorf("%w: SUBSCRIBE without a known policy", ErrProtocol)
		}
		return s.subscribe(string(f.Payload[1:]), SlowPolicy(f.Payload[0]))
	default: // UNSUBSCRIBE
		name := string(f.Payload)
		if _, ok := s.names[name]; ok { // else it is gone already
			delete(s.names, name)
			s.topics.remove(name, s.box)
		}
	}
	return nil
}

func (s *subscriber) subscribe(name string, slow SlowPolicy) error {
	if err := checkTopic(name, true); err != nil {
		return fmt.Errorf("%w: %w", ErrProtocol, err)
	}
	if s.topics == nil {
		return nil
	}
	if _, ok := s.names[name]; !ok && len(s.names) == MaxSubscriptions {
		return fmt.Errorf("%w: more than %d subscriptions", ErrProtocol, MaxSubscriptions)
	}
	if s.box == nil {
		s.box, s.names = new(mailbox), make(map[string]struct{})
		s.box.init(SubscribeOptions{})
		// It may be stuck in the very thing that the worker does not read.
		s.box.slow = s.tooSlow
		s.pump.Go(s.deliver)
	}
	s.box.mu.Lock()
	s.box.o.Slow = slow
	s.box.mu.Unlock()
	s.names[name] = struct{}{}
	s.topics.add(name, s.box)
	return nil
}

// deliver sends the worker what comes until the channel ends.
func (s *subscriber) deliver() {
	var missed uint64
	for {
		m, ok, err := s.box.get()
		if err != nil {
			return
		}
		if !ok {
			<-s.box.wake
			continue
		}
		if s.c.ch.w.waitRoom(pumpRoom) != nil {
			return
		}
		missed += m.Dropped
		if s.c.ch.publish(m.Topic, m.Body, uint32(min(missed, math.MaxUint32))) == nil {
			missed = 0
		} else {
			missed++
		}
	}
}

func (s *subscriber) tooSlow(err error) {
	s.c.mu.Lock()
	s.c.fatal = fmt.Errorf("%w: %w", ErrProtocol, err)
	s.c.mu.Unlock()
	s.c.ch.Close()
}

// end takes the worker off the bus.
func (s *subscriber) end() {
	if s.box == nil {
		return
	}
	for name := range s.names {
		s.topics.remove(name, s.box)
	}
	s.box.close(ErrClosed)
	s.pump.Wait()
}

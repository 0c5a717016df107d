package ipc

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	"pgregory.net/rapid"
)

func soon(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	t.Cleanup(cancel)
	return ctx
}

// Each subscriber gets what its pattern matches, in order, as far as its buffer
// and its policy let it, and is told of what it has missed.
func TestTopicsProperty(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		bus := NewTopics()
		type sub struct {
			s       *Subscription
			want    []string // what waits, "" for one dropped
			pattern string
			o       SubscribeOptions
			slow    bool
		}
		var subs []*sub
		n := 0
		for range rapid.IntRange(1, 60).Draw(t, "steps") {
			switch rapid.IntRange(0, 5).Draw(t, "step") {
			case 0:
				s := &sub{
					pattern: rapid.SampledFrom([]string{"a", "ab", "a*", "*", "b"}).Draw(t, "pattern"),
					o:       SubscribeOptions{Buffer: rapid.IntRange(1, 4).Draw(t, "buffer"), Slow: SlowPolicy(rapid.IntRange(0, 2).Draw(t, "slow"))},
				}
				var err error
				if s.s, err = bus.Subscribe(s.pattern, s.o); err != nil {
					t.Fatal(err)
				}
				subs = append(subs, s)
			case 1, 2, 3:
				topic := rapid.SampledFrom([]string{"a", "ab", "b", "bc"}).Draw(t, "topic")
				n++
				if err := bus.Publish(topic, fmt.Append(nil, n)); err != nil {
					t.Fatal(err)
				}
				for _, s := range subs {
					p, wild := strings.CutSuffix(s.pattern, "*")
					if s.slow || topic != p && (!wild || !strings.HasPrefix(topic, p)) {
						continue
					}
					waiting, oldest := 0, -1
					for i, w := range s.want {
						if w != "" {
							if oldest < 0 {
								oldest = i
							}
							waiting++
						}
					}
					m := fmt.Sprintf("%s %d", topic, n)
					if waiting == s.o.Buffer {
						switch s.o.Slow {
						case DropOldest:
							s.want[oldest] = ""
						case DropNewest:
							m = ""
						default:
							s.slow, s.want = true, nil
							continue
						}
					}
					s.want = append(s.want, m)
				}
			case 4, 5:
				if len(subs) == 0 {
					continue
				}
				s := rapid.SampledFrom(subs).Draw(t, "who")
				if s.slow {
					if _, err := s.s.Receive(context.Background()); !errors.Is(err, ErrSlow) {
						t.Fatalf("Receive of one that is too slow: %v", err)
					}
					continue
				}
				var missed uint64
				for len(s.want) > 0 && s.want[0] == "" {
					missed++
					s.want = s.want[1:]
				}
				if len(s.want) == 0 {
					for range missed {
						s.want = append(s.want, "")
					}
					continue
				}
				m, err := s.s.Receive(context.Background())
				if got := fmt.Sprintf("%s %s", m.Topic, m.Body); err != nil || got != s.want[0] || m.Dropped != missed {
					t.Fatalf("Receive = %s (%d missed), %v; want %s (%d)", got, m.Dropped, err, s.want[0], missed)
				}
				s.want = s.want[1:]
			}
		}
		for _, s := range subs {
			s.s.Close()
			if _, err := s.s.Receive(context.Background()); !errors.Is(err, ErrClosed) && !s.slow {
				t.Fatalf("Receive after Close: %v", err)
			}
		}
		if len(bus.exact)+len(bus.prefix) > 0 {
			t.Fatal("something is left of subscriptions that are closed")
		}
	})
}

func TestTopicsRefuse(t *testing.T) {
	bus := NewTopics()
	for _, name := range []string{"", strings.Repeat("x", 256), "\xff", "a*"} {
		if err := bus.Publish(name, nil); !errors.Is(err, ErrTopic) {
			t.Errorf("Publish(%q): %v", name, err)
		}
	}
	if _, err := bus.Subscribe("", SubscribeOptions{}); !errors.Is(err, ErrTopic) {
		t.Error(err)
	}
	if err := bus.Publish("a", make([]byte, MaxPublish+1)); !errors.Is(err, ErrTooLarge) {
		t.Error(err)
	}
	s, err := bus.Subscribe("a", SubscribeOptions{Bytes: 100})
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		_ = bus.Publish("a", make([]byte, 60))
	}
	ctx, cancel := context.WithCancel(context.Background())
	if m, err := s.Receive(ctx); err != nil || m.Dropped != 4 {
		t.Errorf("bounded by bytes: %d were dropped, %v", m.Dropped, err)
	}
	cancel()
	if _, err := s.Receive(ctx); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if s.Dropped() != 4 {
		t.Errorf("Dropped = %d", s.Dropped())
	}
	s.Close()
}

// bus joins two workers to a bus and returns their ends.
func bus(t *testing.T, o Options) (conn Conn, w *Channel, served chan error) {
	t.Helper()
	a, b := pair(t)
	conn, err := NewFrames(a, o)
	if err != nil {
		t.Fatal(err)
	}
	if w, err = NewChannel(b, ChannelOptions{}); err != nil {
		t.Fatal(err)
	}
	served = make(chan error, 1)
	ready := make(chan struct{})
	go func() { served <- conn.Serve(func() { close(ready) }) }()
	if f, _, _, err := w.Receive(); err != nil || f.Type != TypeHello {
		t.Fatal(f.Type, err)
	}
	if err := w.SendHello(Hello{}); err != nil {
		t.Fatal(err)
	}
	<-ready
	return conn, w, served
}

// Each publisher's messages reach workers and others in order, also where many
// publish and all are busy.
func TestTopicsOverChannels(t *testing.T) {
	topics := NewTopics()
	const workers, each = 4, 200
	var local []*Subscription
	for range 2 {
		s, err := topics.Subscribe("news/*", SubscribeOptions{Buffer: workers * each})
		if err != nil {
			t.Fatal(err)
		}
		local = append(local, s)
	}
	var ends []*Channel
	var serves []chan error
	for range workers {
		_, w, served := bus(t, Options{Topics: topics})
		for _, name := range []string{"news/a", "news/*", "other"} { // heard once all the same
			if err := w.Subscribe(name, DropOldest); err != nil {
				t.Fatal(err)
			}
		}
		if err := errors.Join(w.Unsubscribe("other"), w.Unsubscribe("never"), w.Publish("ready", nil)); err != nil {
			t.Fatal(err)
		}
		ends, serves = append(ends, w), append(serves, served)
	}
	for n := 0; n < workers; { // until all have subscribed
		topics.mu.Lock()
		n = len(topics.exact["news/a"])
		if topics.exact["other"] != nil {
			n = 0
		}
		topics.mu.Unlock()
	}
	var wg sync.WaitGroup
	for i, w := range ends {
		wg.Go(func() {
			for n := range each {
				if err := w.Publish("news/a", fmt.Appendf(bytes.Repeat([]byte("x"), n*10), " %d %d", i, n)); err != nil {
					t.Error(err)
				}
			}
		})
		wg.Go(func() {
			next := make([]int, workers)
			missed := 0
			for heard := 0; heard+missed < workers*each; {
				f, _, _, err := w.Receive()
				if err != nil {
					t.Error(err)
					return
				}
				topic, body, err := ParsePublish(f.Payload)
				if err != nil || topic != "news/a" {
					t.Errorf("%s, %v", topic, err)
					return
				}
				missed += int(f.ID)
				heard++
				from, n := 0, 0
				if _, err := fmt.Sscanf(string(body[bytes.IndexByte(body, ' '):]), " %d %d", &from, &n); err != nil || n < next[from] {
					t.Errorf("message %d of %d, want %d, %v", n, from, next[from], err)
					return
				}
				next[from] = n + 1
			}
		})
	}
	wg.Go(func() {
		for range workers * each {
			one, err := local[0].Receive(soon(t))
			two, err2 := local[1].Receive(soon(t))
			if err != nil || err2 != nil || !bytes.Equal(one.Body, two.Body) {
				t.Errorf("two subscribers do not hear the same: %v, %v", err, err2)
				return
			}
		}
	})
	wg.Wait()
	for _, s := range local {
		s.Close()
	}
	for i, w := range ends {
		w.Close()
		if err := <-serves[i]; err != nil {
			t.Error(err)
		}
	}
	if len(topics.exact)+len(topics.prefix) > 0 {
		t.Error("something is left of workers that are gone")
	}
}

// A worker that reads nothing costs nobody else anything.
func TestSlowWorker(t *testing.T) {
	for _, slow := range []SlowPolicy{DropOldest, Disconnect} {
		topics := NewTopics()
		_, w, served := bus(t, Options{Topics: topics})
		if err := w.Subscribe("*", slow); err != nil {
			t.Fatal(err)
		}
		for n := 0; n == 0; {
			topics.mu.Lock()
			n = len(topics.prefix)
			topics.mu.Unlock()
		}
		for i := range 2000 {
			if err := topics.Publish("t", fmt.Appendf(make([]byte, 10000), " %d", i)); err != nil {
				t.Fatal(err)
			}
		}
		if slow == Disconnect {
			if err := <-served; !errors.Is(err, ErrSlow) || !errors.Is(err, ErrProtocol) {
				t.Errorf("Serve = %v", err)
			}
			w.Close()
			continue
		}
		heard, missed := 0, 0
		for heard+missed < 2000 {
			f, _, _, err := w.Receive()
			if err != nil {
				t.Fatal(err)
			}
			heard, missed = heard+1, missed+int(f.ID)
			if heard+missed == 2000 && !bytes.HasSuffix(f.Payload, []byte(" 1999")) {
				t.Error("the last is not the last")
			}
		}
		if missed == 0 {
			t.Error("nothing was dropped")
		}
		w.Close()
		if err := <-served; err != nil {
			t.Error(err)
		}
	}
}

func TestHostilePublish(t *testing.T) {
	sub := func(name string) []byte { return frame(TypeSubscribe, 0, append([]byte{0}, name...)...) }
	for name, attack := range map[string]func(*enemy){
		"flood": func(e *enemy) {
			b := bytes.Repeat(AppendFrame(nil, Frame{Type: TypePublish, Payload: []byte("\x01tx")}), 100)
			for range 20 {
				e.send(0, b)
			}
		},
		"subscribe flood": func(e *enemy) { e.send(0, bytes.Repeat(sub("x"), 1100)) },
		"subscriptions": func(e *enemy) {
			for i := range MaxSubscriptions + 1 {
				e.send(0, sub(fmt.Sprint(i)))
			}
		},
		"no topic":      func(e *enemy) { e.send(0, sub("")) },
		"no policy":     func(e *enemy) { e.send(0, frame(TypeSubscribe, 0)) },
		"bad policy":    func(e *enemy) { e.send(0, frame(TypeSubscribe, 0, 3, 'x')) },
		"long topic":    func(e *enemy) { e.send(0, sub(strings.Repeat("x", 256))) },
		"empty publish": func(e *enemy) { e.send(0, frame(TypePublish, 0)) },
		"short publish": func(e *enemy) { e.send(0, frame(TypePublish, 0, 2, 'x')) },
		"star publish":  func(e *enemy) { e.send(0, frame(TypePublish, 0, 1, '*')) },
		"long publish":  func(e *enemy) { e.send(0, AppendHeader(nil, TypePublish, 0, 2<<20)) },
		"not UTF-8":     func(e *enemy) { e.send(0, frame(TypePublish, 0, 1, 0xff)) },
	} {
		topics := NewTopics()
		if err := fight(t, Options{Topics: topics, MaxUnsolicited: 1000}, attack); !errors.Is(err, ErrProtocol) && !errors.Is(err, ErrTooLarge) {
			t.Errorf("%s: %v", name, err)
		}
		if len(topics.exact)+len(topics.prefix) > 0 {
			t.Errorf("%s: subscriptions are left", name)
		}
	}
	if err := fight(t, Options{}, func(e *enemy) { e.send(0, sub("x"), frame(TypeUnsubscribe, 0, 'x'), frame(TypePublish, 0, 1, 'x')) }); err != nil {
		t.Errorf("without a bus: %v", err)
	}
}

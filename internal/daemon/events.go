package daemon

import (
	"context"
	"errors"
	"iter"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/client"
)

// keptEvents is how many past events a newcomer can still be told.
const keptEvents = 2000

// errSlow ends the stream of a subscriber that does not keep up; it can come
// back with the Seq of the last event it saw.
var errSlow = errors.New("you read too slowly: ask again after the last event you saw")

// bus is the one place every change of state is announced at. Publishing never
// blocks.
type bus struct {
	mu   sync.Mutex
	seq  uint64
	ring []client.Event // the last keptEvents, oldest at next once full
	next int
	subs map[chan client.Event]struct{}
}

// newBus numbers events from the clock, so that numbers go on growing from one
// controller to the next.
func newBus() *bus {
	return &bus{seq: uint64(time.Now().UnixMicro()), subs: map[chan client.Event]struct{}{}}
}

func (b *bus) publish(e client.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.seq++
	e.Seq, e.Time = b.seq, time.Now()
	if len(b.ring) < keptEvents {
		b.ring = append(b.ring, e)
	} else {
		b.ring[b.next] = e
		b.next = (b.next + 1) % keptEvents
	}
	for ch := range b.subs {
		select {
		case ch <- e:
		default: // it sees its channel closed and knows
			close(ch)
			delete(b.subs, ch)
		}
	}
}

// stream yields kept events after seq and, where follow is set, those to come.
func (b *bus) stream(ctx context.Context, after uint64, follow bool, want func(client.Event) bool) iter.Seq2[client.Event, error] {
	return func(yield func(client.Event, error) bool) {
		past, ch := b.subscribe(after, follow)
		if ch != nil {
			defer b.unsubscribe(ch)
		}
		for _, e := range past {
			if want(e) && !yield(e, nil) {
				return
			}
		}
		for ch != nil {
			select {
			case <-ctx.Done():
				return
			case e, ok := <-ch:
				if !ok {
					yield(client.Event{}, errSlow)
					return
				}
				if want(e) && !yield(e, nil) {
					return
				}
			}
		}
	}
}

func (b *bus) subscribe(after uint64, follow bool) ([]client.Event, chan client.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	var past []client.Event
	for i := range b.ring {
		if e := b.ring[(b.next+i)%len(b.ring)]; e.Seq > after {
			past = append(past, e)
		}
	}
	if !follow {
		return past, nil
	}
	ch := make(chan client.Event, 1024)
	b.subs[ch] = struct{}{}
	return past, ch
}

func (b *bus) unsubscribe(ch chan client.Event) {
	b.mu.Lock()
	defer b.mu.Unlock()
	delete(b.subs, ch)
}

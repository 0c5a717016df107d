package pool

import (
	"context"
	"errors"
	"time"

	"github.com/remuda-dev/remuda/ipc"
)

// BroadcastResult is what one worker made of a broadcast.
type BroadcastResult struct {
	Result
	Err error // as of Do
}

// Broadcast has each worker that is up, spares too, do the task once and
// returns what each of them made of it, in the order of their places in the
// pool. Busy workers do it when they have room; priorities count as in Do. It is
// not bounded by the queue, not tried again, and neither cached nor subject to
// the breaker. Workers that start later do not get it. The error is [ErrClosed],
// [ErrNoWorkers] where none is up, or says that the task cannot be broadcast;
// then no worker got it.
func (p *Pool) Broadcast(ctx context.Context, t Task) ([]BroadcastResult, error) {
	if p.o.Protocol == Exec {
		return nil, errors.New("pool: no broadcasts to exec: no worker stays that could get one")
	}
	if err := t.check(); err != nil {
		return nil, err
	}
	if err := ctx.Err(); err != nil {
		return nil, gaveUp(err)
	}
	now := time.Now()
	var calls, begun []*call
	p.mu.Lock()
	if p.refusing {
		p.mu.Unlock()
		return nil, ErrClosed
	}
	for _, s := range p.shape.slots {
		w := s.w
		if w == nil || !w.up || w.retiring || !s.told {
			continue
		}
		c := p.newCall(&t, now)
		c.only = w
		calls = append(calls, c)
		p.open++
		p.stats.Accepted++
		if w.load < p.o.Concurrency {
			p.assign(w, c)
			begun = append(begun, c)
		} else {
			w.pins.push(c)
		}
	}
	if len(calls) == 0 {
		err := p.broken()
		p.mu.Unlock()
		if err == nil {
			err = ErrNoWorkers
		}
		return nil, err
	}
	p.mu.Unlock()
	p.sendAll(begun)
	results := make([]BroadcastResult, len(calls))
	for i, c := range calls {
		p.await(ctx, c)
		results[i] = BroadcastResult{Result: c.res, Err: c.err}
	}
	return results, nil
}

// newCall makes a call of a task, which it copies.
func (p *Pool) newCall(t *Task, now time.Time) *call {
	done, ok := p.dones.Get().(chan struct{})
	if !ok {
		done = make(chan struct{}, 1)
	}
	c := &call{p: p, task: *t, done: done, timeout: t.Timeout, asked: now}
	if c.timeout == 0 {
		c.timeout = p.o.Timeout
	}
	c.req = ipc.Request{Name: t.Name, Body: t.Body, Files: t.Files, Buffer: t.Buffer, Share: t.ShareResult, Timeout: max(c.timeout, 0), To: c}
	return c
}

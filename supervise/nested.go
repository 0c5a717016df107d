package supervise

import (
	"context"
	"errors"
	"fmt"
)

// AsChild makes a supervisor a child of another, for which it must have been
// made with Options.Nested. Started, it starts all children that are wanted;
// its run is ready when all of them were online or completed, is Done when all
// have ended, and failed where the supervisor gave up.
func (s *Supervisor) AsChild() Child { return nested{s} }

type nested struct{ s *Supervisor }

// period is one run of a nested supervisor.
type period struct {
	s      *Supervisor
	ready  chan struct{}
	up     bool // ready is closed
	done   chan struct{}
	cause  string
	failed string
	exit   Exit // final when done is closed
}

// Start starts all children that are wanted.
func (n nested) Start(ctx context.Context, _ Attempt) (Run, error) {
	s := n.s
	s.mu.Lock()
	defer s.unlock()
	switch {
	case !s.opt.Nested:
		return nil, errors.New("this supervisor was not made with Options.Nested")
	case s.closed:
		return nil, ErrClosed
	case s.period != nil:
		return nil, errors.New("this supervisor is a child already and runs")
	case ctx.Err() != nil:
		return nil, fmt.Errorf("start: %w", ctx.Err())
	}
	p := &period{s: s, ready: make(chan struct{}), done: make(chan struct{})}
	s.period = p
	s.active = true
	s.recent = nil
	var set []*child
	for _, c := range s.order {
		if c.want && !c.alive() {
			set = append(set, c)
		}
	}
	s.beginAll(set)
	return p, nil
}

// checkPeriod is called under the lock after every change.
func (s *Supervisor) checkPeriod() {
	p := s.period
	if p == nil {
		return
	}
	if !s.active && s.live == 0 {
		s.period = nil
		p.exit = Exit{Cause: p.cause}
		if p.failed != "" {
			p.exit = Exit{Code: 1, Failed: true, Err: p.failed}
		}
		close(p.done)
		return
	}
	if p.up || !s.active {
		return
	}
	for _, c := range s.order {
		if c.want && c.state != StateOnline && (c.state != StateStopped || !c.completed) {
			return
		}
	}
	p.up = true
	close(p.ready)
}

func (p *period) Ready() <-chan struct{} { return p.ready }
func (p *period) Done() <-chan struct{}  { return p.done }
func (p *period) Exit() Exit             { return p.exit }
func (p *period) Stop(cause string)      { p.end(cause, false) }
func (p *period) Kill(cause string)      { p.end(cause, true) }

func (p *period) end(cause string, force bool) {
	s := p.s
	s.mu.Lock()
	defer s.unlock()
	if s.period != p || s.detached {
		return
	}
	s.active = false
	p.cause = cause
	s.endAll(s.order, toStop, "its supervisor: "+cause)
	if force {
		s.killAll("its supervisor: " + cause)
	}
}

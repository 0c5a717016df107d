package pool

import "context"

// doFunc does a task. It keeps neither.
type doFunc func(context.Context, *Task) (Result, error)

// layered is Do for a pool with a breaker or a cache. From the outside in: the
// breaker's fallback, so that its results are each caller's own and never kept;
// the cache, which serves what it has also while the breaker is open; the
// breaker; the workers.
func (p *Pool) layered(ctx context.Context, t *Task) (r Result, err error) {
	p.mu.Lock()
	refusing := p.refusing
	p.mu.Unlock()
	if refusing {
		return Result{}, ErrClosed
	}
	if p.cache != nil {
		r, err = p.cache.do(ctx, t)
	} else {
		r, err = p.guarded(ctx, t)
	}
	if err != nil && p.breaker != nil {
		return p.breaker.fallback(ctx, t, r, err)
	}
	return r, err
}

// guarded has the breaker, if there is one, decide on a task.
func (p *Pool) guarded(ctx context.Context, t *Task) (Result, error) {
	if p.breaker == nil {
		return p.do(ctx, t)
	}
	pass, err := p.breaker.enter()
	if err != nil {
		return Result{}, err
	}
	r, err := p.do(ctx, t)
	p.breaker.leave(pass, err)
	return r, err
}

// addLayers puts what the options ask for around the pool.
func (p *Pool) addLayers() (err error) {
	if p.o.Breaker != nil {
		if p.breaker, err = newBreaker(*p.o.Breaker); err != nil {
			return err
		}
	}
	if p.o.Cache != nil {
		p.cache, err = newCache(*p.o.Cache, p.guarded)
	}
	return err
}

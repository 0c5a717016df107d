package pool

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"time"
)

// CacheOptions are the settings of the cache of results in front of a pool.
//
// It serves tasks with a CacheKey: those of one Name and CacheKey are taken to
// be the same task, whatever else they say. While one of them is under way the
// others wait for its end and share it, errors too; Priority, Timeout and Body
// are those of the first. Each caller may leave as its own context says; the
// task is given up when the last has left. What ended in a result is kept for
// TTL, a failure never is.
//
// Tasks with OnProgress, OnChunk, Files or ShareResult are neither kept nor shared. A result
// with Files is one caller's alone: the others' tasks are then done for each.
//
// Nothing is started or set aside as long as nothing is kept.
type CacheOptions struct {
	// TTL is how long a result may be used, from its end on. 0: one minute;
	// below 0: nothing is kept, tasks that come at the same time still share.
	TTL time.Duration
	// MaxBytes bounds what is kept: bodies, keys and 200 bytes for each result.
	// What was not used for the longest time goes first; a result that is
	// larger by itself is not kept. 0: 64 MiB.
	MaxBytes int64
	// MaxEntries bounds the number of results. 0: MaxBytes alone counts.
	MaxEntries int
}

// CacheStats is a cache as it was at one moment, and what it has done so far.
type CacheStats struct {
	Hits    uint64 `json:"hits"`    // tasks that ended at once with a kept result
	Shared  uint64 `json:"shared"`  // tasks that joined one under way
	Misses  uint64 `json:"misses"`  // tasks that had to be done
	Expired uint64 `json:"expired"` // results that their TTL took
	Evicted uint64 `json:"evicted"` // results that had to make room
	Entries int    `json:"entries"` // results that are kept now
	Bytes   int64  `json:"bytes"`   // what they take of MaxBytes
}

// cacheKey is what tasks have in common that are the same.
type cacheKey struct{ name, key string }

// entryCost is what a result takes beside body and key, roughly.
const entryCost = 200

// cache keeps results and lets tasks share executions. It has no goroutine but
// those of the tasks under way, and no timer while it is empty.
type cache struct {
	o    CacheOptions
	next doFunc // does a task

	mu      sync.Mutex
	kept    map[cacheKey]*entry
	flights map[cacheKey]*flight
	use     entries // the one used last comes first
	age     entries // the oldest comes last
	bytes   int64
	expiry  *time.Timer // for the oldest; nil while nothing is kept
	closed  bool
	running sync.WaitGroup // flights

	hits, shared, misses, expired, evicted uint64
}

// entry is one result. It is in two lists.
type entry struct {
	key     cacheKey
	body    []byte // never handed out
	expires time.Time
	use     links
	age     links
}

type links struct{ next, prev *entry }

// flight is one execution, and those who wait for it.
type flight struct {
	ctx     *flightContext
	waiting int // guarded by cache.mu; 0: given up
	done    chan struct{}

	// Set before done is closed.
	res   Result
	err   error
	alone bool // one waits: the body is its own
	taken bool // one has got res with its files; guarded by cache.mu
}

func newCache(o CacheOptions, next doFunc) (*cache, error) {
	if o.MaxBytes < 0 || o.MaxEntries < 0 {
		return nil, errors.New("pool: a cache's MaxBytes and MaxEntries must not be negative")
	}
	if o.TTL == 0 {
		o.TTL = time.Minute
	}
	if o.MaxBytes == 0 {
		o.MaxBytes = 64 << 20
	}
	c := &cache{o: o, next: next}
	c.use.of = func(e *entry) *links { return &e.use }
	c.age.of = func(e *entry) *links { return &e.age }
	return c, nil
}

// do answers a task from what is kept or under way, or by next.
func (c *cache) do(ctx context.Context, t *Task) (Result, error) {
	if t.CacheKey == "" || t.OnProgress != nil || t.OnChunk != nil || t.ShareResult || len(t.Files) > 0 {
		return c.next(ctx, t)
	}
	key, asked := cacheKey{t.Name, t.CacheKey}, time.Now()
	c.mu.Lock()
	if c.closed {
		c.mu.Unlock()
		return c.next(ctx, t) // which says so
	}
	if e := c.get(key, asked); e != nil {
		c.hits++
		c.mu.Unlock()
		return Result{Body: bytes.Clone(e.body), Cached: true}, nil
	}
	f, first := c.flights[key], false
	if f != nil {
		c.shared++
	} else {
		c.misses++
		f, first = &flight{ctx: newFlightContext(ctx), done: make(chan struct{})}, true
		if c.flights == nil {
			c.flights = map[cacheKey]*flight{}
		}
		c.flights[key] = f
		// Its own goroutine, as the first may be the first to leave.
		task := *t
		c.running.Go(func() { c.fly(key, &task, f) })
	}
	f.waiting++
	c.mu.Unlock()

	select {
	case <-f.done:
	case <-ctx.Done():
		if c.leave(key, f, ctx.Err()) {
			return Result{Wait: time.Since(asked)}, gaveUp(ctx.Err())
		}
	}
	return c.share(ctx, t, f, first, asked)
}

// share is what one of those gets who waited for f, which has ended.
func (c *cache) share(ctx context.Context, t *Task, f *flight, first bool, asked time.Time) (Result, error) {
	r := f.res
	if len(r.Files) > 0 {
		c.mu.Lock()
		taken := f.taken
		f.taken = true
		c.mu.Unlock()
		if taken {
			return c.next(ctx, t)
		}
		return r, f.err
	}
	if !first {
		r.Cached = f.err == nil
		r.Wait, r.Run = time.Since(asked), 0
	}
	if !f.alone {
		r.Body = bytes.Clone(r.Body)
	}
	return r, f.err
}

// leave takes one from those who wait for f, and gives it up after the last.
// False: f has ended.
func (c *cache) leave(key cacheKey, f *flight, why error) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	select {
	case <-f.done:
		return false
	default:
	}
	f.waiting--
	if f.waiting == 0 {
		c.land(key)
		f.ctx.end(why)
	}
	return true
}

// land takes a flight out of those that can be joined.
func (c *cache) land(key cacheKey) {
	delete(c.flights, key)
	if len(c.flights) == 0 {
		c.flights = nil // a map does not shrink
	}
}

// fly does the task of a flight.
func (c *cache) fly(key cacheKey, t *Task, f *flight) {
	defer f.ctx.end(context.Canceled)
	r, err := c.next(f.ctx, t)
	c.mu.Lock()
	defer c.mu.Unlock()
	if f.waiting > 0 {
		c.land(key)
	}
	switch {
	case len(r.Files) > 0 && f.waiting == 0:
		closeFiles(r.Files)
	case err == nil && len(r.Files) == 0: // also where all have left
		c.keep(key, r.Body)
	}
	f.res, f.err, f.alone = r, err, f.waiting == 1
	close(f.done)
}

// get returns what is kept, and books that it was used.
func (c *cache) get(key cacheKey, now time.Time) *entry {
	e := c.kept[key]
	if e == nil {
		return nil
	}
	if !now.Before(e.expires) {
		c.expired++
		c.drop(e)
		return nil
	}
	c.use.remove(e)
	c.use.push(e)
	return e
}

func (c *cache) keep(key cacheKey, body []byte) {
	e := &entry{key: key, body: body}
	if c.closed || c.o.TTL < 0 || e.cost() > c.o.MaxBytes {
		return
	}
	if old := c.kept[key]; old != nil {
		c.drop(old)
	}
	for c.bytes+e.cost() > c.o.MaxBytes || c.o.MaxEntries > 0 && len(c.kept) >= c.o.MaxEntries {
		c.evicted++
		c.drop(c.use.last)
	}
	// A slice of its own: the body may be part of something larger.
	e.body = bytes.Clone(body)
	e.expires = time.Now().Add(c.o.TTL)
	if c.kept == nil {
		c.kept = map[cacheKey]*entry{}
	}
	c.kept[key] = e
	c.bytes += e.cost()
	c.use.push(e)
	c.age.push(e)
	if c.expiry == nil {
		c.expiry = time.AfterFunc(c.o.TTL, c.expire)
	}
}

func (e *entry) cost() int64 {
	return int64(len(e.body)) + int64(len(e.key.name)) + int64(len(e.key.key)) + entryCost
}

// drop forgets a result.
func (c *cache) drop(e *entry) {
	delete(c.kept, e.key)
	c.bytes -= e.cost()
	c.use.remove(e)
	c.age.remove(e)
	if len(c.kept) == 0 {
		c.kept = nil // a map does not shrink
		if c.expiry != nil {
			c.expiry.Stop()
			c.expiry = nil
		}
	}
}

// expire forgets what is too old. All have the same TTL, so the oldest goes
// first.
func (c *cache) expire() {
	c.mu.Lock()
	defer c.mu.Unlock()
	now := time.Now()
	for e := c.age.last; e != nil && !now.Before(e.expires); e = c.age.last {
		c.expired++
		c.drop(e)
	}
	if c.expiry != nil && c.age.last != nil {
		// Not for each alone: a little late is soon enough for memory, and what
		// is too old is not used in any case.
		c.expiry.Reset(max(c.age.last.expires.Sub(now), c.o.TTL/16))
	}
}

// close forgets everything. Tasks go past the cache from now on.
func (c *cache) close() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.closed = true
	for c.use.last != nil {
		c.drop(c.use.last)
	}
}

// wait waits for the tasks under way, after close.
func (c *cache) wait() { c.running.Wait() }

func (c *cache) stats() *CacheStats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return &CacheStats{
		Hits: c.hits, Shared: c.shared, Misses: c.misses, Expired: c.expired, Evicted: c.evicted,
		Entries: len(c.kept), Bytes: c.bytes,
	}
}

// entries is a list of entries by one of their links.
type entries struct {
	of          func(*entry) *links
	first, last *entry
}

func (l *entries) push(e *entry) {
	at := l.of(e)
	at.next, at.prev = l.first, nil
	if l.first != nil {
		l.of(l.first).prev = e
	} else {
		l.last = e
	}
	l.first = e
}

func (l *entries) remove(e *entry) {
	at := l.of(e)
	if at.prev != nil {
		l.of(at.prev).next = at.next
	} else {
		l.first = at.next
	}
	if at.next != nil {
		l.of(at.next).prev = at.prev
	} else {
		l.last = at.prev
	}
	*at = links{}
}

// flightContext is the context of a task that several wait for. It has the
// values of the first one's, and ends as the last one's did.
type flightContext struct {
	context.Context
	done chan struct{}

	mu  sync.Mutex
	err error
}

func newFlightContext(of context.Context) *flightContext {
	return &flightContext{Context: context.WithoutCancel(of), done: make(chan struct{})}
}

func (c *flightContext) end(why error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.err == nil {
		c.err = why
		close(c.done)
	}
}

// Done implements context.Context.
func (c *flightContext) Done() <-chan struct{} { return c.done }

// Err implements context.Context.
func (c *flightContext) Err() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.err
}

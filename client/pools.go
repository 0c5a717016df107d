package client

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"time"

	"github.com/remuda-dev/remuda/internal/config"
)

// PoolSpec is one pool of workers as it is to be run.
type PoolSpec = config.Pool

// PoolInfo is one pool of workers.
type PoolInfo struct {
	ID        int       `json:"id"` // unique in the daemon, among apps too
	Name      string    `json:"name"`
	Namespace string    `json:"namespace"`
	State     State     `json:"state"`            // Stopped, Starting, Online, Errored
	Reason    string    `json:"reason,omitempty"` // why it is errored
	Protocol  string    `json:"protocol"`
	Created   time.Time `json:"created"`
	Since     time.Time `json:"since,omitzero"` // start of the present workers
	// Draining is how many tasks earlier workers of the pool (before a change
	// or restart) still have to do.
	Draining   int       `json:"draining,omitempty"`
	PIDs       []int     `json:"pids,omitempty"` // of the workers; not of exec
	CPU        float64   `json:"cpu"`            // percent of one core, of all workers
	Memory     int64     `json:"memory"`         // bytes of RSS, likewise
	OutPath    string    `json:"out_path"`
	ErrPath    string    `json:"err_path"`
	LogTrouble string    `json:"log_trouble,omitempty"`
	Stats      PoolStats `json:"stats"`
	Spec       *PoolSpec `json:"spec,omitempty"` // secrets masked; only where asked for
}

// PoolOutcome is one pool after an action; Error says in words why what was
// asked did not come about.
type PoolOutcome struct {
	PoolInfo
	Error string `json:"error,omitempty"`
}

// PoolStats is what a pool has done since its workers were last started anew.
// The fields are those of Stats in package pool; durations are nanoseconds.
type PoolStats struct {
	Size    int `json:"size"` // workers there shall be, spares not counted
	Min     int `json:"min"`
	Max     int `json:"max"`
	Up      int `json:"up"`      // workers that are ready or at work
	Spare   int `json:"spare"`   // of these, workers that wait for their turn to serve
	Busy    int `json:"busy"`    // workers that have a task
	Queued  int `json:"queued"`  // tasks that wait
	Blocked int `json:"blocked"` // tasks that wait for room in the queue
	Running int `json:"running"` // tasks on workers

	Accepted    uint64 `json:"accepted"`
	Done        uint64 `json:"done"`
	Failed      uint64 `json:"failed"`
	TimedOut    uint64 `json:"timed_out"`
	Cancelled   uint64 `json:"cancelled"`
	Lost        uint64 `json:"lost"` // their worker died
	Dropped     uint64 `json:"dropped"`
	Rejected    uint64 `json:"rejected"`
	Poisoned    uint64 `json:"poisoned"`
	BreakerOpen uint64 `json:"breaker_open"`
	Cached      uint64 `json:"cached"`
	Retried     uint64 `json:"retried"`

	Died     uint64 `json:"died"`     // workers that ended without being asked to
	Recycled uint64 `json:"recycled"` // workers replaced by max_tasks, max_age or max_memory

	Age         time.Duration `json:"age_ns"`
	Utilization float64       `json:"utilization"` // 0 … 1
	Wait        PoolTimes     `json:"wait"`        // in the queue
	Run         PoolTimes     `json:"run"`         // on a worker
	IPC         PoolTimes     `json:"ipc"`         // of that, not in the worker's handler
	Start       PoolTimes     `json:"start"`       // of workers, until ready
	Recent      PoolRecent    `json:"recent"`      // the last 10 to 20 seconds
	Verdict     PoolVerdict   `json:"verdict"`     // on Recent

	Breaker *PoolBreakerStats `json:"breaker,omitempty"`
	Cache   *PoolCacheStats   `json:"cache,omitempty"`
}

// PoolRecent is what became of a pool's time lately. Shares are from 0 to 1.
type PoolRecent struct {
	Span         time.Duration `json:"span_ns"`
	Utilization  float64       `json:"utilization"`
	Missing      float64       `json:"missing"`        // of the workers' time, in which they did not take tasks
	Waiting      float64       `json:"waiting"`        // of the time, in which a task waited
	Overhead     float64       `json:"overhead"`       // of the tasks' time on workers, not in handlers
	Handling     float64       `json:"handling"`       // of the time of busy workers, in handlers
	BytesPerTask int64         `json:"bytes_per_task"` // of bodies, there and back
	Died         uint64        `json:"died"`
	Recycled     uint64        `json:"recycled"`
	Wait         PoolTimes     `json:"wait"`
	Run          PoolTimes     `json:"run"`
	IPC          PoolTimes     `json:"ipc"`
	Start        PoolTimes     `json:"start"`
}

// PoolTimes sums up durations.
type PoolTimes struct {
	Count uint64        `json:"count"`
	Total time.Duration `json:"total_ns"`
	Max   time.Duration `json:"max_ns"`
	P50   time.Duration `json:"p50_ns"`
	P90   time.Duration `json:"p90_ns"`
	P99   time.Duration `json:"p99_ns"`
	P999  time.Duration `json:"p999_ns"`
}

// PoolVerdict says what a pool is held up by.
type PoolVerdict struct {
	Bottleneck string `json:"bottleneck"` // "idle", "startup_bound", "ipc_bound", "workers_saturated", "queue_starved" or "balanced"
	Reason     string `json:"reason"`     // in words
	Advice     string `json:"advice,omitempty"`
}

// PoolBreakerStats is the breaker around a pool.
type PoolBreakerStats struct {
	State          string        `json:"state"` // "closed", "open" or "half-open"
	RetryAfter     time.Duration `json:"retry_after_ns"`
	FailuresInRow  int           `json:"failures_in_row"`
	WindowCalls    int           `json:"window_calls"`
	WindowFailures int           `json:"window_failures"`
	Cause          string        `json:"cause,omitempty"` // what opened it last
	Opened         uint64        `json:"opened"`
	Refused        uint64        `json:"refused"`
	FellBack       uint64        `json:"fell_back"`
}

// PoolCacheStats is the cache of a pool.
type PoolCacheStats struct {
	Hits    uint64 `json:"hits"`
	Shared  uint64 `json:"shared"`
	Misses  uint64 `json:"misses"`
	Expired uint64 `json:"expired"`
	Evicted uint64 `json:"evicted"`
	Entries int    `json:"entries"`
	Bytes   int64  `json:"bytes"`
}

// VerbDrain has a pool take nothing new, do what it has, and stop then. It is
// for pools only.
const VerbDrain Verb = "drain"

// PoolScaleRequest sets a pool's size: "4", "2..8", "+1", "-1".
type PoolScaleRequest struct {
	To string `json:"to"`
}

// TaskKind is how a task of a pool failed.
type TaskKind string

// The kinds of failures.
const (
	TaskFailed      TaskKind = "task"         // the worker reported a failure
	TaskTimedOut    TaskKind = "timeout"      // it did not end in time
	TaskWorkerDied  TaskKind = "worker_died"  // its worker did
	TaskNoWorkers   TaskKind = "no_workers"   // no worker can be started
	TaskQueueFull   TaskKind = "queue_full"   // it was refused
	TaskDropped     TaskKind = "dropped"      // it had to make room for a more urgent one
	TaskPoison      TaskKind = "poison"       // it has ended too many workers
	TaskBreakerOpen TaskKind = "breaker_open" // too many tasks fail at the moment
	TaskClosed      TaskKind = "closed"       // the pool is stopped, or was before the task was done
	TaskInvalid     TaskKind = "invalid"      // it cannot be sent: too large, not JSON
)

// PoolTask is one task for a pool.
type PoolTask struct {
	Name       string // of the worker's handler; frames only
	Body       []byte // JSON for jsonl and node; at most 64 MiB
	Priority   int    // 0 to 9, 9 is most urgent
	Key        string // tasks of one key go to one worker; with consistent-hash
	CacheKey   string // shares the result with tasks of the same name and key; with a cache
	Idempotent bool   // may be done twice: it is tried again where its worker died
	// Timeout bounds the time on a worker. 0: the pool's own.
	Timeout time.Duration
}

// PoolResult is what a task came to.
type PoolResult struct {
	Body     []byte
	Wait     time.Duration // for a worker
	Run      time.Duration // on a worker
	PID      int           // of that worker; 0 where there was none
	Attempts int
	Cached   bool
}

// ErrTaskLost says that the connection to the daemon broke while a task was
// under way. Whether it was done is not known.
var ErrTaskLost = errors.New("the daemon went away while the task was under way, so it may or may not have been done")

// Pools returns the pools that any of targets matches, all where none is given,
// in order of id.
func (c *Client) Pools(ctx context.Context, targets ...Target) ([]PoolInfo, error) {
	return c.pools(ctx, url.Values{"target": targets})
}

// DescribePools is [Client.Pools] with specs.
func (c *Client) DescribePools(ctx context.Context, secrets bool, targets ...Target) ([]PoolInfo, error) {
	q := url.Values{"target": targets, "spec": {"true"}}
	if secrets {
		q.Set("secrets", "true")
	}
	return c.pools(ctx, q)
}

func (c *Client) pools(ctx context.Context, q url.Values) ([]PoolInfo, error) {
	out, err := call[struct{ Pools []PoolInfo }](ctx, c, http.MethodGet, "/v1/pools", q, nil)
	return out.Pools, err
}

// ActPools carries out a verb on pools: [Client.Act] for targets that must be
// pools.
func (c *Client) ActPools(ctx context.Context, req ActRequest) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/pools", nil, req)
}

// ScalePool sets the size of a pool, from now on; no task is cut short.
func (c *Client) ScalePool(ctx context.Context, pool, to string) (ActResult, error) {
	return call[ActResult](ctx, c, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/scale", nil, PoolScaleRequest{To: to})
}

// Do has a pool do a task and returns its result. A failure is an *[Error] with
// a Kind, or [ErrTaskLost]. When ctx ends first the task is given up.
func (c *Client) Do(ctx context.Context, pool string, t PoolTask) (PoolResult, error) {
	q := url.Values{}
	set := func(name, value string, is bool) {
		if is {
			q.Set(name, value)
		}
	}
	set("task", t.Name, t.Name != "")
	set("priority", strconv.Itoa(t.Priority), t.Priority != 0)
	set("key", t.Key, t.Key != "")
	set("cache_key", t.CacheKey, t.CacheKey != "")
	set("idempotent", "true", t.Idempotent)
	set("timeout", t.Timeout.String(), t.Timeout != 0)
	resp, err := c.send(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/tasks", q, "application/octet-stream", t.Body)
	if err != nil {
		return PoolResult{}, lost(ctx, err)
	}
	defer resp.Body.Close()
	number := func(name string) int64 {
		n, _ := strconv.ParseInt(resp.Header.Get(name), 10, 64)
		return n
	}
	r := PoolResult{
		Wait: time.Duration(number(HeaderWait)), Run: time.Duration(number(HeaderRun)),
		PID: int(number(HeaderPID)), Attempts: int(number(HeaderAttempts)), Cached: resp.Header.Get(HeaderCached) == "true",
	}
	if r.Body, err = io.ReadAll(resp.Body); err != nil {
		return PoolResult{}, lost(ctx, fmt.Errorf("the daemon hung up: %w", err))
	}
	return r, nil
}

// Headers of a task's result; durations are nanoseconds.
const (
	HeaderWait     = "Remuda-Wait"
	HeaderRun      = "Remuda-Run"
	HeaderPID      = "Remuda-Pid"
	HeaderAttempts = "Remuda-Attempts"
	HeaderCached   = "Remuda-Cached"
)

// lost names what it means for a task that the connection broke.
func lost(ctx context.Context, err error) error {
	var refused *Error
	switch {
	case errors.As(err, &refused), errors.Is(err, ErrUnreachable):
		return err
	case ctx.Err() != nil:
		return ctx.Err()
	}
	return fmt.Errorf("%w: %w", ErrTaskLost, err)
}

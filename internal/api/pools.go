package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strconv"
	"sync/atomic"
	"time"

	"github.com/danielgtaylor/huma/v2"

	"github.com/remuda-dev/remuda/client"
)

const (
	// maxTask bounds the body of a task.
	maxTask = 64 << 20
	// maxTasks bounds the bodies of all tasks that are read or done at a time.
	maxTasks = 1 << 30
	// firstRead is how much of a body is taken in before its length is believed.
	firstRead = 64 << 10
)

// PoolName is the part of a path that names a pool. It is exported for huma, as
// [TargetQuery].
type PoolName struct {
	Name string `path:"name" maxLength:"200" doc:"Name or id of the pool."`
}

// taskInput is a task. Its body is read by the handler: it goes to a worker as
// it is, and the task may outlive the call.
type taskInput struct {
	PoolName
	Task       string `query:"task" maxLength:"1024" doc:"Name of the worker's handler (frames)."`
	Priority   int    `query:"priority" minimum:"0" maximum:"9" doc:"9 is most urgent."`
	Key        string `query:"key" maxLength:"4096" doc:"Tasks of one key go to one worker (consistent-hash)."`
	CacheKey   string `query:"cache_key" maxLength:"4096" doc:"Shares the result with tasks of the same name and key."`
	Idempotent bool   `query:"idempotent" doc:"The task may be done twice: it is tried again where its worker died."`
	Timeout    string `query:"timeout" maxLength:"64" doc:"Bounds the time on a worker, for example 1.5s."`

	body    io.Reader
	length  int64
	timeout time.Duration
}

// Resolve implements [huma.Resolver].
func (in *taskInput) Resolve(ctx huma.Context) []error {
	in.body, in.length = ctx.BodyReader(), -1
	if n, err := strconv.ParseInt(ctx.Header("Content-Length"), 10, 64); err == nil {
		in.length = n
	}
	if in.Timeout == "" {
		return nil
	}
	d, err := time.ParseDuration(in.Timeout)
	if err != nil || d <= 0 {
		return []error{&huma.ErrorDetail{Location: "query.timeout", Message: fmt.Sprintf("%.64q is no duration such as 500ms, 1.5s or 2m", in.Timeout)}}
	}
	in.timeout = d
	return nil
}

// taskOutput is a result.
type taskOutput struct {
	ContentType string `header:"Content-Type"`
	Wait        int64  `header:"Remuda-Wait" doc:"Nanoseconds in the queue."`
	Run         int64  `header:"Remuda-Run" doc:"Nanoseconds on a worker."`
	PID         int    `header:"Remuda-Pid"`
	Attempts    int    `header:"Remuda-Attempts"`
	Cached      bool   `header:"Remuda-Cached"`
	Body        []byte
}

// taskProblem is an RFC 9457 problem that says how a task failed.
type taskProblem struct {
	huma.ErrorModel
	Kind client.TaskKind `json:"kind" doc:"How the task failed."`
	Code string          `json:"code,omitempty" doc:"The worker's own."`
	Data json.RawMessage `json:"data,omitempty" doc:"The worker's own."`
}

// budget is the memory for bodies of tasks.
type budget struct{ used atomic.Int64 }

func (b *budget) take(n int64) bool {
	if b.used.Add(n) <= maxTasks {
		return true
	}
	b.used.Add(-n)
	return false
}

var (
	errBody = errors.New("the task is larger than 64 MiB: hand over a file's name, or give the task in parts")
	errBusy = errors.New("the tasks that are under way take up all the memory there is for them (1 GiB): try again")
)

// readTask reads a body whole, into memory that grows as it comes. What it
// takes of the budget the caller gives back.
func (b *budget) read(r io.Reader, length int64) (body []byte, taken int64, err error) {
	if length > maxTask {
		return nil, 0, errBody
	}
	size := int64(firstRead)
	if length >= 0 {
		size = min(length, firstRead)
	}
	for {
		if more := size - taken; more > 0 {
			if !b.take(more) {
				return nil, taken, errBusy
			}
			taken = size
			grown := make([]byte, len(body), size)
			copy(grown, body)
			body = grown
		}
		n, err := io.ReadFull(r, body[len(body):cap(body)])
		body = body[:len(body)+n]
		if length >= 0 && int64(len(body)) == length {
			return body, taken, nil
		}
		switch {
		case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF):
			if length >= 0 {
				return nil, taken, io.ErrUnexpectedEOF
			}
			return body, taken, nil
		case err != nil:
			return nil, taken, err
		case size > maxTask:
			return nil, taken, errBody
		}
		size *= 4
		if length >= 0 {
			size = min(size, length)
		}
		size = min(size, maxTask+1)
	}
}

func pools(a huma.API, d Daemon) {
	type query struct {
		TargetQuery
		Spec    bool `query:"spec" doc:"Tell how the pools are to be run, too."`
		Secrets bool `query:"secrets" doc:"Show the values of variables whose names look like secrets."`
	}
	type list struct {
		Pools []client.PoolInfo `json:"pools"`
	}
	get(a, "pools", "/v1/pools", "List pools of workers", func(_ context.Context, in *query) (list, error) {
		p, err := d.Pools(in.Target, in.Spec, in.Secrets)
		if p == nil {
			p = []client.PoolInfo{}
		}
		return list{p}, err
	})
	post(a, "act-pools", "/v1/pools", "Start, stop, drain, restart, delete, flush or reopen pools", d.ActPools)
	type scale struct {
		PoolName
		Body client.PoolScaleRequest
	}
	huma.Register(a, huma.Operation{OperationID: "scale-pool", Method: http.MethodPost, Path: "/v1/pools/{name}/scale", Summary: "Set the size of a pool"},
		func(ctx context.Context, in *scale) (*body[client.ActResult], error) {
			out, err := d.ScalePool(context.WithoutCancel(ctx), in.Name, in.Body.To)
			return &body[client.ActResult]{out}, problem(err)
		})
	memory := &budget{}
	huma.Register(a, huma.Operation{
		OperationID: "do", Method: http.MethodPost, Path: "/v1/pools/{name}/tasks", Summary: "Have a pool do a task",
		Description: "The body is the task, the answer's the result, both as they are. The task is given up when the caller hangs up.",
		RequestBody: &huma.RequestBody{Content: map[string]*huma.MediaType{"application/octet-stream": {}}},
	}, func(ctx context.Context, in *taskInput) (*taskOutput, error) {
		b, taken, err := memory.read(in.body, in.length)
		defer func() { memory.used.Add(-taken) }()
		switch {
		case errors.Is(err, errBody):
			return nil, taskError(&client.Error{Status: http.StatusRequestEntityTooLarge, Kind: client.TaskInvalid, Detail: err.Error()})
		case errors.Is(err, errBusy):
			return nil, taskError(&client.Error{Status: http.StatusServiceUnavailable, Kind: client.TaskQueueFull, Detail: err.Error()})
		case err != nil:
			return nil, taskError(&client.Error{Status: http.StatusBadRequest, Kind: client.TaskInvalid, Detail: "the task cannot be read: " + err.Error()})
		}
		r, err := d.Do(ctx, in.Name, client.PoolTask{
			Name: in.Task, Body: b, Priority: in.Priority, Key: in.Key, CacheKey: in.CacheKey, Idempotent: in.Idempotent, Timeout: in.timeout,
		})
		if err != nil {
			return nil, taskError(err)
		}
		return &taskOutput{
			ContentType: "application/octet-stream", Wait: int64(r.Wait), Run: int64(r.Run), PID: r.PID, Attempts: r.Attempts, Cached: r.Cached, Body: r.Body,
		}, nil
	})
}

// taskError is problem with the kind of a task's failure.
func taskError(err error) error {
	var e *client.Error
	if !errors.As(err, &e) || e.Kind == "" {
		return problem(err)
	}
	return &taskProblem{
		ErrorModel: huma.ErrorModel{Status: e.Status, Title: http.StatusText(e.Status), Detail: e.Detail},
		Kind:       e.Kind, Code: e.Code, Data: e.Data,
	}
}

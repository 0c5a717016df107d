// Package api serves the daemon's HTTP API: routes, validation of what comes
// in, problem+json for what goes wrong, OpenAPI generated from the Go types of
// package client.
//
// Invariant: nothing reaches the [Daemon] that was not decoded, bounded and
// checked against the schema; and only root and the daemon's own user get an
// answer at all.
//
// It must never know how the daemon does what it is asked, nor import anything
// that runs processes.
package api

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"iter"
	"net/http"
	"strconv"
	"time"

	"github.com/danielgtaylor/huma/v2"
	"github.com/danielgtaylor/huma/v2/adapters/humago"

	"github.com/remuda-dev/remuda/client"
)

// Daemon is what the API is the face of. Its errors that are a *[client.Error]
// keep their status; others become a 500.
type Daemon interface {
	Info() client.Info
	List(targets []client.Target) ([]client.Instance, error)
	Describe(targets []client.Target, secrets bool) ([]client.Detail, error)
	Start(context.Context, client.StartRequest) (client.ActResult, error)
	Act(context.Context, client.ActRequest) (client.ActResult, error)
	Signal(context.Context, client.SignalRequest) (client.ActResult, error)
	Message(context.Context, client.MessageRequest) (client.ActResult, error)
	Scale(context.Context, client.ScaleRequest) (client.ActResult, error)
	Up(context.Context, client.UpRequest) (client.ActResult, error)
	Down(ctx context.Context, source string) (client.ActResult, error)
	Save(ctx context.Context, force bool) (client.Saved, error)
	Resurrect(context.Context) (client.ActResult, error)
	Upgrade(ctx context.Context, binary string) error
	Kill(context.Context) error
	Pools(targets []client.Target, specs, secrets bool) ([]client.PoolInfo, error)
	ActPools(context.Context, client.ActRequest) (client.ActResult, error)
	ScalePool(ctx context.Context, pool, to string) (client.ActResult, error)
	Do(ctx context.Context, pool string, t client.PoolTask) (client.PoolResult, error)
	Logs(context.Context, client.LogQuery) (iter.Seq2[client.LogLine, error], error)
	Events(ctx context.Context, after uint64, follow bool, targets []client.Target) (iter.Seq2[client.Event, error], error)
}

// maxBody bounds a request: a thousand apps with a large environment each.
const maxBody = 64 << 20

type body[T any] struct{ Body T }

// TargetQuery is the part of a query that chooses instances. It is exported for
// huma, which looks past embedded types that are not.
type TargetQuery struct {
	Target []string `query:"target,explode" doc:"Name, id, namespace, app:index, /regular expression/ or all; may be repeated. None means all."`
}

// Handler returns the API of d. It is safe for concurrent use.
func Handler(d Daemon, version string) http.Handler {
	mux := http.NewServeMux()
	cfg := huma.DefaultConfig("Remuda", version)
	cfg.DocsPath = "" // huma's page loads scripts from another host
	cfg.CreateHooks = nil
	a := humago.New(mux, cfg)

	get(a, "info", "/v1/info", "Describe the daemon", func(context.Context, *struct{}) (client.Info, error) {
		return d.Info(), nil
	})
	type instances struct {
		Instances []client.Instance `json:"instances"`
	}
	get(a, "list", "/v1/instances", "List instances", func(_ context.Context, in *TargetQuery) (instances, error) {
		list, err := d.List(in.Target)
		return instances{list}, err
	})
	type details struct {
		Details []client.Detail `json:"details"`
	}
	type detailQuery struct {
		TargetQuery
		Secrets bool `query:"secrets" doc:"Show the values of variables whose names look like secrets."`
	}
	get(a, "describe", "/v1/details", "Describe instances", func(_ context.Context, in *detailQuery) (details, error) {
		list, err := d.Describe(in.Target, in.Secrets)
		return details{list}, err
	})

	post(a, "start", "/v1/start", "Add apps and start them", d.Start)
	post(a, "act", "/v1/act", "Start, stop, restart, reload, delete, reset, flush or reopen", d.Act)
	post(a, "signal", "/v1/signal", "Send a signal", d.Signal)
	post(a, "message", "/v1/message", "Send a message to Node programs", d.Message)
	post(a, "scale", "/v1/scale", "Set the number of instances", d.Scale)
	post(a, "up", "/v1/up", "Make what runs of a file equal the file", d.Up)
	type down struct {
		Source string `json:"source"`
	}
	post(a, "down", "/v1/down", "Stop and delete the apps of a file", func(ctx context.Context, in down) (client.ActResult, error) {
		return d.Down(ctx, in.Source)
	})
	type save struct {
		Force bool `json:"force,omitempty"`
	}
	post(a, "save", "/v1/save", "Write the present apps to the dump file", func(ctx context.Context, in save) (client.Saved, error) {
		return d.Save(ctx, in.Force)
	})
	post(a, "resurrect", "/v1/resurrect", "Start the apps of the dump file", func(ctx context.Context, _ struct{}) (client.ActResult, error) {
		return d.Resurrect(ctx)
	})
	type upgrade struct {
		Binary string `json:"binary" doc:"Absolute path of the new binary."`
	}
	post(a, "upgrade", "/v1/upgrade", "Replace the controller", func(ctx context.Context, in upgrade) (struct{}, error) {
		return struct{}{}, d.Upgrade(ctx, in.Binary)
	})
	post(a, "kill", "/v1/kill", "Stop every app and end the daemon", func(ctx context.Context, _ struct{}) (struct{}, error) {
		return struct{}{}, d.Kill(ctx)
	})

	pools(a, d)

	type logQuery struct {
		TargetQuery
		Lines  int       `query:"lines" doc:"Last N lines of each file; negative for all."`
		Since  time.Time `query:"since"`
		Until  time.Time `query:"until"`
		Grep   string    `query:"grep" maxLength:"1000" doc:"RE2 expression."`
		Out    bool      `query:"out"`
		Err    bool      `query:"err"`
		Follow bool      `query:"follow"`
	}
	streamOf(a, "logs", "/v1/logs", "Read or follow logs, one JSON value a line", func(ctx context.Context, in *logQuery) (iter.Seq2[client.LogLine, error], error) {
		return d.Logs(ctx, client.LogQuery{Targets: in.Target, Lines: in.Lines, Since: in.Since, Until: in.Until, Grep: in.Grep, Out: in.Out, Err: in.Err, Follow: in.Follow})
	})
	type eventQuery struct {
		TargetQuery
		After  uint64 `query:"after"`
		Follow bool   `query:"follow"`
	}
	streamOf(a, "events", "/v1/events", "Read or follow events, one JSON value a line", func(ctx context.Context, in *eventQuery) (iter.Seq2[client.Event, error], error) {
		return d.Events(ctx, in.After, in.Follow, in.Target)
	})
	return checkVersion(mux, version)
}

// checkVersion refuses peers of another API version in words, before the
// difference can show as a strange validation error.
func checkVersion(next http.Handler, version string) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set(client.HeaderAPI, strconv.Itoa(client.API))
		if h := r.Header.Get(client.HeaderAPI); h != "" && h != strconv.Itoa(client.API) {
			w.Header().Set("Content-Type", "application/problem+json")
			w.WriteHeader(http.StatusNotAcceptable)
			_ = json.NewEncoder(w).Encode(huma.ErrorModel{
				Status: http.StatusNotAcceptable,
				Title:  "Another version",
				Detail: fmt.Sprintf("the command speaks version %.20q of the API and the daemon (Remuda %s) version %d: run `remuda upgrade` with the newer of the two", h, version, client.API),
			})
			return
		}
		next.ServeHTTP(w, r)
	})
}

func get[I, O any](a huma.API, id, path, summary string, do func(context.Context, *I) (O, error)) {
	huma.Register(a, huma.Operation{OperationID: id, Method: http.MethodGet, Path: path, Summary: summary},
		func(ctx context.Context, in *I) (*body[O], error) {
			out, err := do(ctx, in)
			return &body[O]{out}, problem(err)
		})
}

// post registers a change. It is carried out to its end even if the caller
// hangs up: half of a restart is worse than either whole.
func post[I, O any](a huma.API, id, path, summary string, do func(context.Context, I) (O, error)) {
	huma.Register(a, huma.Operation{OperationID: id, Method: http.MethodPost, Path: path, Summary: summary, MaxBodyBytes: maxBody},
		func(ctx context.Context, in *body[I]) (*body[O], error) {
			out, err := do(context.WithoutCancel(ctx), in.Body)
			return &body[O]{out}, problem(err)
		})
}

func streamOf[I, T any](a huma.API, id, path, summary string, open func(context.Context, *I) (iter.Seq2[T, error], error)) {
	huma.Register(a, huma.Operation{OperationID: id, Method: http.MethodGet, Path: path, Summary: summary},
		func(ctx context.Context, in *I) (*huma.StreamResponse, error) {
			items, err := open(ctx, in)
			if err != nil {
				return nil, problem(err)
			}
			return &huma.StreamResponse{Body: func(hc huma.Context) { writeStream(ctx, hc, items) }}, nil
		})
}

// streamLine is one line of a stream: a value, or the reason it broke off.
type streamLine struct {
	Value any    `json:"value,omitempty"`
	Error string `json:"error,omitempty"`
}

func writeStream[T any](ctx context.Context, hc huma.Context, items iter.Seq2[T, error]) {
	hc.SetHeader("Content-Type", "application/x-ndjson")
	w := hc.BodyWriter()
	flush := func() {
		if f, ok := w.(http.Flusher); ok {
			f.Flush()
		}
	}
	flush() // so that the follower of a silent log knows it is connected
	enc := json.NewEncoder(w)
	for item, err := range items {
		line := streamLine{Value: item}
		if err != nil {
			if ctx.Err() != nil {
				break
			}
			line = streamLine{Error: err.Error()}
		}
		if enc.Encode(line) != nil || err != nil {
			return
		}
		flush()
	}
	if ctx.Err() != nil {
		// The reader has gone, or the controller is going: then a clean end
		// would look as if there were no more to come.
		panic(http.ErrAbortHandler)
	}
}

func problem(err error) error {
	if err == nil {
		return nil
	}
	var e *client.Error
	if errors.As(err, &e) {
		return huma.NewError(e.Status, e.Detail)
	}
	return huma.NewError(http.StatusInternalServerError, err.Error())
}

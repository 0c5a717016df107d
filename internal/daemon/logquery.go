package daemon

import (
	"context"
	"iter"
	"net/http"
	"regexp"
	"slices"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/logs"
)

// Logs implements [api.Daemon].
func (d *Daemon) Logs(ctx context.Context, q client.LogQuery) (iter.Seq2[client.LogLine, error], error) {
	chosen, err := d.match(q.Targets)
	if err != nil {
		return nil, err
	}
	lq := logs.Query{Lines: q.Lines, Since: q.Since, Until: q.Until, Follow: q.Follow}
	if q.Grep != "" {
		if lq.Grep, err = regexp.Compile(q.Grep); err != nil {
			return nil, refuse(http.StatusUnprocessableEntity, "grep: %v", err)
		}
	}
	for _, i := range chosen {
		i.mu.Lock()
		spec := i.spec
		out, errPath := i.logPaths(spec)
		i.mu.Unlock()
		add := func(stream, path string) {
			lq.Files = append(lq.Files, logs.QueryFile{Source: logs.Source{App: i.app, ID: i.id, Stream: stream}, Path: path, JSON: spec.Logs.JSON, TimeFormat: spec.Logs.TimeFormat})
		}
		if q.Out || !q.Err {
			add(logs.Out, out)
		}
		if q.Err || !q.Out {
			add(logs.Err, errPath)
		}
	}
	return func(yield func(client.LogLine, error) bool) {
		if len(lq.Files) == 0 {
			return
		}
		for r, err := range logs.Read(ctx, lq) {
			line := client.LogLine{Time: r.Time, App: r.Source.App, ID: r.Source.ID, Stream: r.Source.Stream, Text: r.Text, Cut: r.Cut}
			if !yield(line, err) {
				return
			}
		}
	}, nil
}

// Events implements [api.Daemon].
func (d *Daemon) Events(ctx context.Context, after uint64, follow bool, targets []client.Target) (iter.Seq2[client.Event, error], error) {
	var ids []int
	if len(targets) > 0 {
		chosen, err := d.match(targets)
		if err != nil {
			return nil, err
		}
		for _, i := range chosen {
			ids = append(ids, i.id)
		}
	}
	return d.bus.stream(ctx, after, follow, func(e client.Event) bool {
		return len(targets) == 0 || slices.Contains(ids, e.ID)
	}), nil
}

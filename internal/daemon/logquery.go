package daemon

import (
	"context"
	"iter"
	"net/http"
	"regexp"
	"slices"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/logs"
)

// Logs implements [api.Daemon].
func (d *Daemon) Logs(ctx context.Context, q client.LogQuery) (iter.Seq2[client.LogLine, error], error) {
	chosen, pools, err := d.matchAll(q.Targets)
	if err != nil {
		return nil, err
	}
	lq := logs.Query{Lines: q.Lines, Since: q.Since, Until: q.Until, Follow: q.Follow}
	if q.Grep != "" {
		if lq.Grep, err = regexp.Compile(q.Grep); err != nil {
			return nil, refuse(http.StatusUnprocessableEntity, "grep: %v", err)
		}
	}
	add := func(app string, id int, spec config.Logs, out, errPath string) {
		file := func(stream, path string) {
			lq.Files = append(lq.Files, logs.QueryFile{Source: logs.Source{App: app, ID: id, Stream: stream}, Path: path, JSON: spec.JSON, TimeFormat: spec.TimeFormat})
		}
		if q.Out || !q.Err {
			file(logs.Out, out)
		}
		if q.Err || !q.Out {
			file(logs.Err, errPath)
		}
	}
	for _, i := range chosen {
		i.mu.Lock()
		out, errPath := i.logPaths(i.spec)
		spec := i.spec.Logs
		i.mu.Unlock()
		add(i.app, i.id, spec, out, errPath)
	}
	for _, p := range pools {
		spec, out, errPath := p.logs()
		add(p.name, p.id, spec, out, errPath)
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
		chosen, pools, err := d.matchAll(targets)
		if err != nil {
			return nil, err
		}
		for _, i := range chosen {
			ids = append(ids, i.id)
		}
		for _, p := range pools {
			ids = append(ids, p.id)
		}
	}
	return d.bus.stream(ctx, after, follow, func(e client.Event) bool {
		return len(targets) == 0 || slices.Contains(ids, e.ID)
	}), nil
}

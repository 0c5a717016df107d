package daemon

import (
	"context"
	"fmt"
	"os"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/remuda-dev/remuda/internal/cluster"
	"github.com/remuda-dev/remuda/internal/config"
	"github.com/remuda-dev/remuda/internal/sockets"
	"github.com/remuda-dev/remuda/proc"
	"github.com/remuda-dev/remuda/supervise"
)

const (
	// listenWait is how long a worker without a probe may take until it
	// listens, before it counts as ready all the same: it may never want to.
	listenWait = 3 * time.Second
	// replaceWait is how long a worker may take until it listens that is to
	// take the place of one that does.
	replaceWait = 30 * time.Second
	// drainWait is how long a worker that is replaced may take to finish its
	// connections, before it is told to end by signal; then its grace begins.
	drainWait = 8 * time.Second
	// partWait is how long one that has nothing left to do may take to end by
	// itself, before it is told by signal too.
	partWait = 500 * time.Millisecond
	// pruneWait is how long after a start a port that no worker has asked for
	// stays open.
	pruneWait = 30 * time.Second
)

// clusters are the primaries of the apps in cluster mode. Safe for use by
// several goroutines.
type clusters struct {
	d *Daemon

	mu   sync.Mutex
	m    map[string]*cluster.Primary    // by app
	kept map[string]map[string]*os.File // listeners of an earlier controller, by prefix
}

// keptPrefix is how the keeper's names of the listeners of an app begin.
func keptPrefix(app string) string { return "cl-" + hashed(app) + "-" }

// inherit takes the listeners out of what the keeper had stored.
func (c *clusters) inherit(stored map[string]*os.File) {
	c.m, c.kept = map[string]*cluster.Primary{}, map[string]map[string]*os.File{}
	n := len(keptPrefix(""))
	for name, f := range stored {
		if len(name) <= n || !strings.HasPrefix(name, "cl-") {
			continue
		}
		if c.kept[name[:n]] == nil {
			c.kept[name[:n]] = map[string]*os.File{}
		}
		c.kept[name[:n]][name[n:]] = f
		delete(stored, name)
	}
}

// settle closes the listeners of apps that are no more.
func (c *clusters) settle(apps map[string]*app) {
	c.mu.Lock()
	defer c.mu.Unlock()
	there := map[string]bool{}
	for name := range apps {
		there[keptPrefix(name)] = true
	}
	for prefix := range c.kept {
		if !there[prefix] {
			c.drop(prefix)
		}
	}
}

// of is the primary of the app, made where there is none.
func (c *clusters) of(spec config.App, cred *proc.Credential) (*cluster.Primary, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	policy, err := cluster.ParsePolicy(spec.Env["NODE_CLUSTER_SCHED_POLICY"])
	if err != nil {
		return nil, err
	}
	if spec.Sticky {
		policy = cluster.Sticky
	}
	if p := c.m[spec.Name]; p != nil {
		p.SetPolicy(policy)
		return p, nil
	}
	prefix := keptPrefix(spec.Name)
	o := cluster.Options{Policy: policy, Store: keeperStore{c.d, prefix}, Listeners: c.kept[prefix], OnError: func(err error) {
		c.d.log.Warn("cluster", "app", spec.Name, "error", err)
	}}
	if cred != nil {
		o.Owner = &sockets.Owner{UID: int(cred.UID), GID: int(cred.GID)}
	} else if o.Preload, err = cluster.WritePreload(c.d.home); err != nil { // another user could not read it
		c.d.log.Warn("cluster", "app", spec.Name, "error", err)
	}
	delete(c.kept, prefix)
	p, err := cluster.NewPrimary(o)
	if err != nil {
		return nil, err
	}
	c.m[spec.Name] = p
	return p, nil
}

// rest gives the ports of an app back that is not to run any more.
func (c *clusters) rest(name string) {
	c.remove(name, func(i *instance) bool {
		st, ok := i.sup.Status(i.name)
		return ok && (st.Run != nil || !supervise.Ended(st))
	})
}

// fork gives the ports of an app back that is no longer in cluster mode, so
// that it can open them itself.
func (c *clusters) fork(name string) {
	c.mu.Lock()
	none := c.m[name] == nil && c.kept[keptPrefix(name)] == nil
	c.mu.Unlock()
	if none {
		return
	}
	c.remove(name, func(i *instance) bool {
		i.mu.Lock()
		defer i.mu.Unlock()
		return slices.ContainsFunc(i.runs, func(r *run) bool { return r.cluster })
	})
}

// remove ends the primary of an app and its listeners, unless an instance of
// the app still needs them.
func (c *clusters) remove(name string, needs func(*instance) bool) {
	list := c.d.instancesNamed(name)
	c.mu.Lock()
	defer c.mu.Unlock()
	if slices.ContainsFunc(list, needs) {
		return
	}
	if p := c.m[name]; p != nil {
		delete(c.m, name)
		p.Remove()
	}
	c.drop(keptPrefix(name))
}

// drop closes listeners of an earlier controller. c.mu is held.
func (c *clusters) drop(prefix string) {
	for key, f := range c.kept[prefix] {
		f.Close()
		_ = keeperStore{c.d, prefix}.Drop(key)
	}
	delete(c.kept, prefix)
}

// prune closes, after a while in which the new runs can ask for them, the ports
// that an app's instances had and have no more.
func (c *clusters) prune(name string) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if p := c.m[name]; p != nil {
		time.AfterFunc(pruneWait, p.Prune)
	}
}

// end gives up all: everything, or with keep only this process's part.
func (c *clusters) end(keep bool) {
	c.mu.Lock()
	defer c.mu.Unlock()
	for name, p := range c.m {
		delete(c.m, name)
		if keep {
			p.Close()
		} else {
			p.Remove()
		}
	}
	for prefix, files := range c.kept {
		delete(c.kept, prefix)
		for _, f := range files {
			f.Close()
		}
	}
}

// keeperStore is the keeper as a [cluster.Store].
type keeperStore struct {
	d      *Daemon
	prefix string
}

// Put implements [cluster.Store].
func (s keeperStore) Put(name string, f *os.File) error {
	ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
	defer cancel()
	return s.d.keeper.Put(ctx, s.prefix+name, nil, f)
}

// Drop implements [cluster.Store].
func (s keeperStore) Drop(name string) error {
	ctx, cancel := context.WithTimeout(context.Background(), keeperWait)
	defer cancel()
	return s.d.keeper.Drop(ctx, s.prefix+name)
}

// join attaches the run, whose channel f is, to its app's primary.
func (r *run) join(f *os.File, adopted bool) error {
	cred, err := credential(r.spec)
	var p *cluster.Primary
	if err == nil {
		p, err = r.inst.d.clusters.of(r.spec, cred)
	}
	if err != nil {
		f.Close()
		return err
	}
	w, err := p.Attach(r.inst.index+1, f, cluster.Handlers{OnMessage: r.message, OnClose: r.ipcClosed}, adopted)
	if err != nil {
		return err
	}
	r.worker, r.ipc = w, w
	return nil
}

// listening waits until a worker listens, but no longer than most.
func (r *run) listening(ctx context.Context, most time.Duration) error {
	t := time.NewTimer(most)
	defer t.Stop()
	select {
	case <-r.worker.Listening():
		return nil
	case <-t.C:
		return fmt.Errorf("does not listen within %s", most)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// drain is how long a worker of the app is let finish its connections. Who
// wants it gone does not wait for those that last.
func drain(spec config.App, cause string) time.Duration {
	if cause == "stop" || cause == "delete" {
		return min(drainWait, spec.Stop.Grace.Std()/2)
	}
	return drainWait
}

// part has a worker close its servers and finish its connections before it is
// told to end.
func (r *run) part(cause string) {
	if r.worker == nil || r.worker.Disconnect() != nil {
		return
	}
	t := time.NewTimer(drain(r.spec, cause))
	defer t.Stop()
	select {
	case <-r.worker.Done():
		t.Reset(partWait)
	case <-r.proc.Done():
		return
	case <-r.killed:
		return
	case <-t.C:
		return
	}
	select {
	case <-r.proc.Done():
	case <-t.C:
	}
}

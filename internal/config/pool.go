package config

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"time"
)

// Pool is a set of workers that the daemon keeps, complete and valid: what a
// worker is, and how tasks come to it. It travels over the API and is in the
// state file, so its JSON names are an interface. 0 is off, or none, wherever
// a field has no least value.
type Pool struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"`

	// As for an [App].
	Command     []string          `json:"command"`
	Script      string            `json:"script"`
	Interpreter string            `json:"interpreter"`
	Cwd         string            `json:"cwd"`
	Env         map[string]string `json:"env,omitempty"`
	InheritEnv  bool              `json:"inherit_env,omitempty"`
	User        string            `json:"user,omitempty"`
	Group       string            `json:"group,omitempty"`
	Umask       string            `json:"umask,omitempty"`
	Autostart   bool              `json:"autostart"`
	Logs        Logs              `json:"logs"`

	Protocol      string   `json:"protocol"` // "frames" | "jsonl" | "node" | "exec"
	Min           int      `json:"min"`      // ≥ 1
	Max           int      `json:"max"`      // ≥ Min; the same: of fixed size
	ScaleUpWait   Duration `json:"scale_up_wait"`
	ScaleDownIdle Duration `json:"scale_down_idle"`
	Cooldown      Duration `json:"cooldown"`
	Spares        int      `json:"spares,omitempty"`
	Concurrency   int      `json:"concurrency"` // ≥ 1
	Balance       string   `json:"balance"`     // "least-busy" | "round-robin" | "two-choices" | "consistent-hash"
	Queue         int      `json:"queue"`
	Full          string   `json:"full"` // "block" | "reject" | "drop-lowest"
	Ageing        Duration `json:"ageing,omitempty"`

	Timeout      Duration `json:"timeout,omitempty"`
	Grace        Duration `json:"grace"`
	StartTimeout Duration `json:"start_timeout"` // > 0
	Retries      int      `json:"retries"`
	PoisonAfter  int      `json:"poison_after"`
	MaxTasks     int      `json:"max_tasks,omitempty"`
	MaxAge       Duration `json:"max_age,omitempty"`
	MaxMemory    int64    `json:"max_memory,omitempty"` // bytes
	Heartbeat    Duration `json:"heartbeat,omitempty"`
	MaxMessage   int64    `json:"max_message"` // bytes, > 0

	Breaker *PoolBreaker `json:"breaker,omitempty"`
	Cache   *PoolCache   `json:"cache,omitempty"`

	// Source is the file the pool came from ("" for none).
	Source string `json:"source,omitempty"`
}

// PoolBreaker opens after Failures in a row, or when the share Rate of at least
// MinCalls tasks within Window failed; it stays open for OpenFor.
type PoolBreaker struct {
	Failures int      `json:"failures"`
	Rate     float64  `json:"rate,omitempty"` // 0 … 1
	Window   Duration `json:"window"`         // > 0
	MinCalls int      `json:"min_calls"`      // ≥ 1
	OpenFor  Duration `json:"open_for"`       // > 0
}

// PoolCache keeps results of tasks that carry a cache key.
type PoolCache struct {
	TTL        Duration `json:"ttl"`                   // 0: tasks that come at the same time share, nothing is kept
	MaxBytes   int64    `json:"max_bytes"`             // > 0
	MaxEntries int      `json:"max_entries,omitempty"` // 0: MaxBytes alone counts
}

// Bounds and defaults of pools.
const (
	maxPoolSize        = 4096
	maxPoolMessage     = 256 << 20
	defaultPoolMessage = 64 << 20
	defaultQueue       = 1024
	maxQueue           = 1 << 20
)

// App is what a worker of the pool has in common with an instance of an app.
func (p *Pool) App() App {
	return App{
		Name: p.Name, Namespace: p.Namespace, Command: p.Command, Script: p.Script, Interpreter: p.Interpreter, Cwd: p.Cwd,
		Env: p.Env, InheritEnv: p.InheritEnv, User: p.User, Group: p.Group, Umask: p.Umask, Autostart: p.Autostart,
		Instances: 1, ExecMode: "fork", Restart: defaultRestart(),
		Stop: Stop{Signal: "SIGTERM"}, Ready: Probe{Type: "none"}, Logs: p.Logs, Source: p.Source,
	}
}

// ValidatePool is [Validate] for pools.
func ValidatePool(p Pool) error {
	var list problems
	for _, f := range validatePool(&p) {
		list.at(0, 0, "pool %s: %s", clip(p.Name), f.text)
	}
	return list.err()
}

func validatePool(p *Pool) []fieldProblem {
	a := p.App()
	v := &validator{list: validate(&a)}
	v.oneOf("protocol", p.Protocol, "frames", "jsonl", "node", "exec")
	v.oneOf("balance", p.Balance, "least-busy", "round-robin", "two-choices", "consistent-hash")
	v.oneOf("full", p.Full, "block", "reject", "drop-lowest")
	size := "max"
	if p.Min == p.Max {
		size = "size"
	}
	v.check(p.Min >= 1 && p.Min <= maxPoolSize, "min", "min: %d is not from 1 to %d", p.Min, maxPoolSize)
	v.check(p.Max >= p.Min, size, "max: %d is less than min, %d", p.Max, p.Min)
	v.check(p.Max <= maxPoolSize, size, "%s: %d is more than %d", size, p.Max, maxPoolSize)
	between := func(path string, n, least, most int) {
		v.check(n >= least && n <= most, path, "%s: %d is not from %d to %d", path, n, least, most)
	}
	between("spares", p.Spares, 0, maxPoolSize)
	between("concurrency", p.Concurrency, 1, 1<<16)
	between("queue", p.Queue, 0, maxQueue)
	between("retries", p.Retries, 0, 1000)
	between("poison_after", p.PoisonAfter, 0, 1_000_000)
	between("max_tasks", p.MaxTasks, 0, 1<<40)
	if p.Protocol == "exec" {
		v.check(p.Max*p.Concurrency <= maxPoolSize, "concurrency", "concurrency: %d for each of %d workers are more than %d processes", p.Concurrency, p.Max, maxPoolSize)
		v.check(p.MaxMemory == 0, "max_memory", "max_memory needs workers that stay; those of exec end with their task")
	}
	for path, d := range map[string]Duration{
		"scale_up_wait": p.ScaleUpWait, "scale_down_idle": p.ScaleDownIdle, "cooldown": p.Cooldown, "ageing": p.Ageing,
		"timeout": p.Timeout, "grace": p.Grace, "max_age": p.MaxAge, "heartbeat": p.Heartbeat, "start_timeout": p.StartTimeout,
	} {
		v.span(path, d)
	}
	v.check(p.StartTimeout > 0, "start_timeout", "start_timeout: must be more than 0")
	v.check(p.Heartbeat == 0 || p.Protocol == "frames" || p.Protocol == "node", "heartbeat", "heartbeat needs the protocol frames or node, not %s", clip(p.Protocol))
	v.check(p.MaxMemory >= 0, "max_memory", "max_memory: %d is negative", p.MaxMemory)
	v.check(p.MaxMessage >= 1024 && p.MaxMessage <= maxPoolMessage, "max_message", "max_message: %d bytes is not from 1K to 256M", p.MaxMessage)
	if b := p.Breaker; b != nil {
		v.check(b.Failures >= 0, "breaker.failures", "breaker.failures: %d is negative", b.Failures)
		v.check(b.Rate >= 0 && b.Rate <= 1, "breaker.rate", "breaker.rate: %v is no share from 0 to 1", b.Rate)
		v.check(b.Failures > 0 || b.Rate > 0, "breaker", "breaker: neither failures nor rate is set, so it would never open")
		v.span("breaker.window", b.Window)
		v.span("breaker.open_for", b.OpenFor)
		v.check(b.Window > 0, "breaker.window", "breaker.window: must be more than 0")
		v.check(b.OpenFor > 0, "breaker.open_for", "breaker.open_for: must be more than 0")
		v.check(b.MinCalls >= 1, "breaker.min_calls", "breaker.min_calls: %d is less than 1", b.MinCalls)
	}
	if c := p.Cache; c != nil {
		v.span("cache.ttl", c.TTL)
		v.check(c.MaxBytes >= 1024, "cache.max_bytes", "cache.max_bytes: %d bytes is less than 1K", c.MaxBytes)
		v.check(c.MaxEntries >= 0, "cache.max_entries", "cache.max_entries: %d is negative", c.MaxEntries)
	}
	return v.list
}

// DiffPools is [Diff] for two specs of one pool.
func DiffPools(old, updated Pool) []string {
	var d differ
	a, b := reflect.ValueOf(old), reflect.ValueOf(updated)
	for i := range a.NumField() {
		switch name := jsonName(a.Type().Field(i)); name {
		case "env":
			d.env(&App{Env: old.Env}, &App{Env: updated.Env})
		case "source":
		default:
			d.value(name, a.Field(i), b.Field(i))
		}
	}
	return d.list
}

// remudaPool is an entry of pools in remuda.yaml.
type remudaPool struct {
	Run        words             `json:"run" jsonschema_description:"The command of a worker, as for an app."`
	Shell      bool              `json:"shell,omitempty" jsonschema_description:"Run the string by /bin/sh -c."`
	Cwd        string            `json:"cwd,omitempty" jsonschema_description:"Working directory, relative to the file. Default: the folder of the file."`
	Namespace  string            `json:"namespace,omitempty" jsonschema_description:"Namespace of the pool."`
	Env        envMap            `json:"env,omitempty" jsonschema_description:"Variables, as a mapping or a list of NAME=value."`
	EnvNamed   map[string]envMap `json:"-" prefix:"env_"`
	EnvFile    envFiles          `json:"env_file,omitempty" jsonschema_description:".env files; env goes over them."`
	InheritEnv *bool             `json:"inherit_env,omitempty" jsonschema_description:"Pass on the daemon's PATH, HOME, LANG and the like. Default: true."`
	User       id                `json:"user,omitempty" jsonschema_description:"Run workers as this user (name or uid); the daemon must be root."`
	Group      id                `json:"group,omitempty" jsonschema_description:"Run workers with this group (name or gid). Default: the user's."`
	Umask      octal             `json:"umask,omitempty" jsonschema_description:"File mode mask, octal."`
	Autostart  *bool             `json:"autostart,omitempty" jsonschema_description:"false: added as stopped. Default: true."`
	Logs       *remudaLogs       `json:"logs,omitempty" jsonschema_description:"Where the workers' output goes that is no answer."`

	Protocol      string     `json:"protocol,omitempty" jsonschema:"enum=frames,enum=jsonl,enum=node,enum=exec" jsonschema_description:"How tasks reach a worker: frames (the SDKs), jsonl (a line in, a line out), node (process.on and process.send), exec (a process for each task). Default: frames."`
	Size          *instances `json:"size,omitempty" jsonschema_description:"How many workers: a number, max (one per CPU) or -1 (one CPU left free). Default: max."`
	Min           *int       `json:"min,omitempty" jsonschema:"minimum=1" jsonschema_description:"Least number of workers, in place of size. Default with max: 1."`
	Max           *instances `json:"max,omitempty" jsonschema_description:"Most workers, in place of size; the pool grows while tasks wait and shrinks when workers are idle. Default with min: one per CPU, at least min."`
	ScaleUpWait   *Duration  `json:"scale_up_wait,omitempty" jsonschema_description:"How long the oldest task must have waited for the pool to grow. Default: 100ms."`
	ScaleDownIdle *Duration  `json:"scale_down_idle,omitempty" jsonschema_description:"How long a worker more than min must have been idle to be ended. Default: 30s."`
	Cooldown      *Duration  `json:"cooldown,omitempty" jsonschema_description:"Least time between two changes of the size by the pool itself. Default: 1s."`
	Spares        int        `json:"spares,omitempty" jsonschema:"minimum=0" jsonschema_description:"Workers beyond the size that are kept started and ready. Default: 0."`
	Concurrency   *int       `json:"concurrency,omitempty" jsonschema:"minimum=1" jsonschema_description:"Tasks that a worker has at a time. Default: 1."`
	Balance       string     `json:"balance,omitempty" jsonschema:"enum=least-busy,enum=round-robin,enum=two-choices,enum=consistent-hash" jsonschema_description:"Which worker gets a task; consistent-hash goes by the task's key. Default: least-busy."`
	Queue         *int       `json:"queue,omitempty" jsonschema:"minimum=0" jsonschema_description:"Tasks that wait for a worker before full counts. Default: 1024."`
	Full          string     `json:"full,omitempty" jsonschema:"enum=block,enum=reject,enum=drop-lowest" jsonschema_description:"What becomes of a task that finds the queue full: its caller waits, it is refused, or it drops the newest one of a lower priority. Default: block."`
	Ageing        *Duration  `json:"ageing,omitempty" jsonschema_description:"A task that waits rises by one priority each time this long has passed. Default: 0, never."`

	Timeout      *Duration `json:"timeout,omitempty" jsonschema_description:"Bounds a task's time on a worker where the task sets none. Default: 0, unbounded."`
	Grace        *Duration `json:"grace,omitempty" jsonschema_description:"How long a worker has to give up a task, or to end, before it is killed. Default: 2s."`
	StartTimeout *Duration `json:"start_timeout,omitempty" jsonschema_description:"Bounds the time until a worker is ready. Default: 30s."`
	Retries      *int      `json:"retries,omitempty" jsonschema:"minimum=0" jsonschema_description:"How often an idempotent task is tried again after its worker died. Default: 2."`
	PoisonAfter  *int      `json:"poison_after,omitempty" jsonschema:"minimum=0" jsonschema_description:"A task that has ended this many workers is refused; 0 for never. Default: 3."`
	MaxTasks     int       `json:"max_tasks,omitempty" jsonschema:"minimum=0" jsonschema_description:"Replace a worker after this many tasks; 0 for never. Default: 0."`
	MaxAge       *Duration `json:"max_age,omitempty" jsonschema_description:"Replace a worker that is this old; 0 for never. Default: 0."`
	MaxMemory    byteSize  `json:"max_memory,omitempty" jsonschema_description:"Replace a worker when it and its children use more: 300M."`
	Heartbeat    *Duration `json:"heartbeat,omitempty" jsonschema_description:"Ask a worker that holds tasks and is silent for a sign of life this often (frames and node); 0 for never. Default: 0."`
	MaxMessage   *byteSize `json:"max_message,omitempty" jsonschema_description:"The largest task or answer. Default: 64M."`

	Breaker *remudaBreaker `json:"breaker,omitempty" jsonschema_description:"Refuse tasks for a while when too many fail: true, or a mapping."`
	Cache   *remudaCache   `json:"cache,omitempty" jsonschema_description:"Keep results of tasks that carry a cache key: true, or a mapping."`
}

func (p *remudaPool) decodeNode(d *decoder, n *node, what string) {
	switch n.kind {
	case kString, kList:
		p.Run.decodeNode(d, n, what)
	case kMap:
		d.into(n, p, what)
		if n.get("run") == nil {
			d.on(n, "%s has no run; write run: and the command of a worker", what)
		}
	default:
		d.wrong(n, what, "a command or a mapping with run:")
	}
}

type remudaBreaker struct {
	Failures *int      `json:"failures,omitempty" jsonschema:"minimum=0" jsonschema_description:"Failures in a row that open it; 0 for none. Default: 5, or 0 where rate is set."`
	Rate     share     `json:"rate,omitempty" jsonschema_description:"Open when this share of the tasks within window failed: 0.5 or 50%. Default: 0, off."`
	Window   *Duration `json:"window,omitempty" jsonschema_description:"Default: 10s."`
	MinCalls *int      `json:"min_calls,omitempty" jsonschema:"minimum=1" jsonschema_description:"Tasks there must be within window for rate to count. Default: 20."`
	OpenFor  *Duration `json:"open_for,omitempty" jsonschema_description:"How long tasks are refused before one is tried. Default: 30s."`
	off      bool
}

func (b *remudaBreaker) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kBool {
		b.off = n.text == "false"
		return
	}
	d.into(n, b, what)
}

type remudaCache struct {
	TTL        *Duration `json:"ttl,omitempty" jsonschema_description:"How long a result may be used; 0: nothing is kept, tasks that come at the same time share. Default: 1m."`
	MaxBytes   *byteSize `json:"max_bytes,omitempty" jsonschema_description:"Bounds what is kept. Default: 64M."`
	MaxEntries int       `json:"max_entries,omitempty" jsonschema:"minimum=0" jsonschema_description:"Bounds the number of results; 0: max_bytes alone counts. Default: 0."`
	off        bool
}

func (c *remudaCache) decodeNode(d *decoder, n *node, what string) {
	if n.kind == kBool {
		c.off = n.text == "false"
		return
	}
	d.into(n, c, what)
}

// share is a part of a whole: 0.5 or 50%.
type share float64

func (s *share) decodeNode(d *decoder, n *node, what string) {
	text, percent := strings.CutSuffix(n.text, "%")
	f, err := strconv.ParseFloat(text, 64)
	if percent {
		f /= 100
	}
	if n.kind != kNumber && n.kind != kString || err != nil || !(f >= 0 && f <= 1) {
		d.wrong(n, what, "a share such as 0.5 or 50%")
		return
	}
	*s = share(f)
}

// pool is the counterpart of app.
func (l *remudaLoader) pool(entry field, rf *remudaFile, shared map[string]string, logs Logs) Pool {
	what := "pool " + clip(entry.key)
	vars := l.variables(entry.val, shared, what)
	l.lookup = l.chain(vars)
	defer func() { l.lookup = l.chain(shared) }()
	before := len(l.list) + l.more
	var r remudaPool
	r.decodeNode(&l.decoder, l.resolve(entry.val), what)
	p := Pool{
		Name:       entry.key,
		Namespace:  orElse(r.Namespace, orElse(rf.Namespace, "default")),
		Cwd:        absPath(l.dir, orElse(r.Cwd, "."), l.home()),
		Env:        l.env(&remudaApp{Env: r.Env, EnvNamed: r.EnvNamed, EnvFile: r.EnvFile}, rf, vars),
		InheritEnv: or(r.InheritEnv, true),
		User:       string(r.User),
		Group:      string(r.Group),
		Umask:      string(r.Umask),
		Autostart:  or(r.Autostart, true),
		Logs:       l.logs(logs, r.Logs, place(what, "logs")),
		Source:     l.file,

		Protocol:      orElse(r.Protocol, "frames"),
		ScaleUpWait:   or(r.ScaleUpWait, Duration(100*time.Millisecond)),
		ScaleDownIdle: or(r.ScaleDownIdle, Duration(30*time.Second)),
		Cooldown:      or(r.Cooldown, Duration(time.Second)),
		Spares:        r.Spares,
		Concurrency:   or(r.Concurrency, 1),
		Balance:       orElse(r.Balance, "least-busy"),
		Queue:         or(r.Queue, defaultQueue),
		Full:          orElse(r.Full, "block"),
		Ageing:        or(r.Ageing, 0),
		Timeout:       or(r.Timeout, 0),
		Grace:         or(r.Grace, Duration(2*time.Second)),
		StartTimeout:  or(r.StartTimeout, Duration(30*time.Second)),
		Retries:       or(r.Retries, 2),
		PoisonAfter:   or(r.PoisonAfter, 3),
		MaxTasks:      r.MaxTasks,
		MaxAge:        or(r.MaxAge, 0),
		MaxMemory:     int64(r.MaxMemory),
		Heartbeat:     or(r.Heartbeat, 0),
		MaxMessage:    int64(or(r.MaxMessage, defaultPoolMessage)),
		Breaker:       r.breaker(),
		Cache:         r.cache(),
	}
	var sized string
	p.Min, p.Max, sized = r.bounds()
	if sized != "" {
		l.on(entry.val.get("size"), "%s: size is for a fixed number of workers, min and max for an elastic one; keep either size or %s", what, sized)
	}
	if argv, ok := r.Run.argv(&l.decoder, r.Shell, what+": run"); ok {
		a := App{Name: p.Name, Cwd: p.Cwd, Env: p.Env}
		l.program(what, &a, argv, r.Shell, orNode(r.Run.n, entry.val))
		p.Command, p.Script, p.Interpreter = a.Command, a.Script, a.Interpreter
	}
	if len(l.list)+l.more == before {
		for _, f := range validatePool(&p) {
			line, col := entry.line, entry.col
			if f.path != "name" {
				line, col = find(entry.val, f.path, line, col)
			}
			l.at(line, col, "%s: %s", what, f.text)
		}
	}
	return p
}

// bounds are the least and the most workers; clash names what must not be said
// beside size.
func (r *remudaPool) bounds() (least, most int, clash string) {
	switch {
	case r.Min == nil && r.Max == nil:
		n := int(or(r.Size, instances(cpus())))
		return n, n, ""
	case r.Min == nil:
		least, most, clash = 1, int(*r.Max), "max"
	case r.Max == nil:
		least, most, clash = *r.Min, max(*r.Min, cpus()), "min"
	default:
		least, most, clash = *r.Min, int(*r.Max), "min and max"
	}
	if r.Size == nil {
		clash = ""
	}
	return least, most, clash
}

func (r *remudaPool) breaker() *PoolBreaker {
	b := r.Breaker
	if b == nil || b.off {
		return nil
	}
	failures := 5
	if b.Rate > 0 {
		failures = 0
	}
	return &PoolBreaker{
		Failures: or(b.Failures, failures), Rate: float64(b.Rate), Window: or(b.Window, Duration(10*time.Second)),
		MinCalls: or(b.MinCalls, 20), OpenFor: or(b.OpenFor, Duration(30*time.Second)),
	}
}

func (r *remudaPool) cache() *PoolCache {
	c := r.Cache
	if c == nil || c.off {
		return nil
	}
	return &PoolCache{TTL: or(c.TTL, Duration(time.Minute)), MaxBytes: int64(or(c.MaxBytes, 64<<20)), MaxEntries: c.MaxEntries}
}

func or[T any](p *T, other T) T {
	if p == nil {
		return other
	}
	return *p
}

func poolNames(pools []Pool) []string {
	names := make([]string, len(pools))
	for i := range pools {
		names[i] = pools[i].Name
	}
	return names
}

// pools decodes the pools of the file.
func (l *remudaLoader) pools(n *node, rf *remudaFile, shared map[string]string, f *File) {
	if n == nil || n.kind == kNull {
		return
	}
	if n.kind != kMap {
		l.on(n, "pools: %s where a mapping NAME: COMMAND should be", n.kind)
		return
	}
	taken := map[string]bool{}
	for i := range f.Apps {
		taken[f.Apps[i].Name] = true
	}
	for _, entry := range n.fields {
		f.Pools = append(f.Pools, l.pool(entry, rf, shared, f.Daemon.Logs))
		if taken[entry.key] {
			l.at(entry.line, entry.col, "pool %s: an app has that name already; rename one, as commands know both by name", clip(entry.key))
		}
	}
}

// noSuch says what the file has where a name is not in it.
func (f *File) noSuch(name string) string {
	names := append(appNames(f.Apps), poolNames(f.Pools)...)
	return fmt.Sprintf("there is no app %q in the file%s", name, orElse(didYouMean(name, names), "; it has "+oneLine(strings.Join(names, ", "))))
}

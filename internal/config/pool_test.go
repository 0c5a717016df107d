package config

import (
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"
)

func TestPools(t *testing.T) {
	const text = `
env: {SHARED: s}
logs: {keep: 2}
pools:
  plain: python3 worker.py
  full:
    run: [node, worker.js]
    namespace: jobs
    env: {A: 1}
    env_production: {A: 2}
    user: nobody
    umask: "022"
    autostart: false
    protocol: node
    min: 2
    max: 6
    scale_up_wait: 0
    scale_down_idle: 1m
    cooldown: 2s
    spares: 1
    concurrency: 4
    balance: consistent-hash
    queue: 0
    full: drop-lowest
    ageing: 5s
    timeout: 10s
    grace: 0
    start_timeout: 5s
    retries: 0
    poison_after: 0
    max_tasks: 100
    max_age: 1h
    max_memory: 300M
    max_message: 1M
    breaker: {rate: 50%, window: 5s, min_calls: 4, open_for: 3s}
    cache: {ttl: 0, max_bytes: 1M, max_entries: 9}
    logs: {out: none}
  half: {run: sh, min: 3, max: 3, breaker: true, cache: true, heartbeat: 0}
`
	opts := circumstances(t)
	opts.Env, opts.Cwd = "production", "/srv"
	opts.NoCheck = true
	f, warnings, err := Parse(t.Context(), "remuda.yaml", []byte(text), opts)
	if err != nil || len(warnings) > 0 {
		t.Fatal(err, warnings)
	}
	if len(f.Apps) != 0 || len(f.Pools) != 3 {
		t.Fatalf("%+v", f)
	}
	for _, p := range f.Pools {
		if err := ValidatePool(p); err != nil {
			t.Error(err)
		}
	}
	logs := defaultLogs()
	logs.Keep = 2
	sec := Duration(time.Second)
	plain := Pool{
		Name: "plain", Namespace: "default", Command: []string{"python3", "worker.py"}, Script: "worker.py", Interpreter: "python3", Cwd: "/srv",
		Env: map[string]string{"SHARED": "s"}, InheritEnv: true, Autostart: true, Logs: logs,
		Protocol: "frames", Min: cpus(), Max: cpus(), ScaleUpWait: sec / 10, ScaleDownIdle: 30 * sec, Cooldown: sec,
		Concurrency: 1, Balance: "least-busy", Queue: 1024, Full: "block", Grace: 2 * sec, StartTimeout: 30 * sec,
		Retries: 2, PoisonAfter: 3, MaxMessage: 64 << 20,
	}
	if !reflect.DeepEqual(f.Pools[0], plain) {
		t.Errorf("got  %+v\nwant %+v", f.Pools[0], plain)
	}
	logs.Out = "/dev/null"
	full := Pool{
		Name: "full", Namespace: "jobs", Command: []string{"node", "worker.js"}, Script: "worker.js", Interpreter: "node", Cwd: "/srv",
		Env: map[string]string{"SHARED": "s", "A": "2"}, InheritEnv: true, User: "nobody", Umask: "022", Logs: logs,
		Protocol: "node", Min: 2, Max: 6, ScaleDownIdle: 60 * sec, Cooldown: 2 * sec, Spares: 1, Concurrency: 4,
		Balance: "consistent-hash", Full: "drop-lowest", Ageing: 5 * sec, Timeout: 10 * sec, StartTimeout: 5 * sec,
		MaxTasks: 100, MaxAge: 3600 * sec, MaxMemory: 300e6, MaxMessage: 1e6,
		Breaker: &PoolBreaker{Rate: 0.5, Window: 5 * sec, MinCalls: 4, OpenFor: 3 * sec},
		Cache:   &PoolCache{MaxBytes: 1e6, MaxEntries: 9},
	}
	full.MaxMemory, full.MaxMessage, full.Cache.MaxBytes = f.Pools[1].MaxMemory, f.Pools[1].MaxMessage, f.Pools[1].Cache.MaxBytes // M is checked elsewhere
	full.Logs.Out = f.Pools[1].Logs.Out
	if !reflect.DeepEqual(f.Pools[1], full) {
		t.Errorf("got  %+v\nwant %+v", f.Pools[1], full)
	}
	if b, c := f.Pools[2].Breaker, f.Pools[2].Cache; b.Failures != 5 || c.TTL != 60*sec || f.Pools[2].Min != 3 {
		t.Errorf("%+v %+v", b, c)
	}
	if d := DiffPools(plain, plain); len(d) > 0 {
		t.Error(d)
	}
	other := plain
	other.Max, other.Env, other.Breaker, other.Source = 9, map[string]string{"SHARED": "t"}, &PoolBreaker{}, "x"
	if d := DiffPools(plain, other); len(d) != 3 || !slices.Contains(d, "env.SHARED: s → t") || !slices.Contains(d, "breaker: off → on") {
		t.Errorf("%q", d)
	}
}

// TestPoolMistakes: as for apps, what is wrong is told with its place.
func TestPoolMistakes(t *testing.T) {
	for _, c := range []struct{ name, body, want string }{
		{"unknown key", "pools:\n  a:\n    run: sh\n    concurency: 2\n", `remuda.yaml:4:5: unknown key "concurency" in pool "a": did you mean "concurrency"?`},
		{"nested key", "pools:\n  a: {run: sh, breaker: {falures: 1}}\n", `unknown key "falures" in pool "a": breaker: did you mean "failures"?`},
		{"no run", "pools:\n  a: {size: 2}\n", `pool "a" has no run; write run: and the command of a worker`},
		{"list", "pools: [a]\n", `pools: a list where a mapping NAME: COMMAND should be`},
		{"protocol", "pools:\n  a: {run: sh, protocol: json}\n", `remuda.yaml:2:26: pool "a": protocol: "json" is not known: did you mean "jsonl"?`},
		{"balance", "pools:\n  a: {run: sh, balance: fair}\n", `write least-busy, round-robin, two-choices or consistent-hash`},
		{"full", "pools:\n  a: {run: sh, full: rejekt}\n", `did you mean "reject"?`},
		{"size and max", "pools:\n  a: {run: sh, size: 2, max: 4}\n", `pool "a": size is for a fixed number of workers, min and max for an elastic one; keep either size or max`},
		{"max below min", "pools:\n  a: {run: sh, min: 4, max: 2}\n", `max: 2 is less than min, 4`},
		{"no worker", "pools:\n  a: {run: sh, min: 0}\n", `min: 0 is not from 1 to 4096`},
		{"too many", "pools:\n  a: {run: sh, size: 5000}\n", `remuda.yaml:2:22: pool "a": size: 5000 is more than 4096`},
		{"concurrency", "pools:\n  a: {run: sh, concurrency: 0}\n", `concurrency: 0 is not from 1 to 65536`},
		{"exec processes", "pools:\n  a: {run: sh, protocol: exec, size: 100, concurrency: 100}\n", `100 for each of 100 workers are more than 4096 processes`},
		{"exec memory", "pools:\n  a: {run: sh, protocol: exec, max_memory: 1M}\n", `max_memory needs workers that stay`},
		{"heartbeat", "pools:\n  a: {run: sh, protocol: jsonl, heartbeat: 1s}\n", `heartbeat needs the protocol frames or node, not "jsonl"`},
		{"duration", "pools:\n  a: {run: sh, timeout: soon}\n", `"soon" is not a duration`},
		{"negative", "pools:\n  a: {run: sh, grace: -1s}\n", `-1s is negative`},
		{"retries", "pools:\n  a: {run: sh, retries: -1}\n", `retries: -1 is not from 0 to 1000`},
		{"rate", "pools:\n  a: {run: sh, breaker: {rate: 120%}}\n", `"120%" where a share such as 0.5 or 50% should be`},
		{"never opens", "pools:\n  a: {run: sh, breaker: {failures: 0}}\n", `neither failures nor rate is set, so it would never open`},
		{"cache", "pools:\n  a: {run: sh, cache: {max_bytes: 10}}\n", `cache.max_bytes: 10 bytes is less than 1K`},
		{"message", "pools:\n  a: {run: sh, max_message: 1G}\n", `max_message: `},
		{"start timeout", "pools:\n  a: {run: sh, start_timeout: 0}\n", `start_timeout: must be more than 0`},
		{"shell", "pools:\n  a: sh | cat\n", `pool "a": run: | means something to a shell only`},
		{"program", "pools:\n  a: ./none\n", `pool "a": run: program DIR/none does not exist`},
		{"name of an app", "apps: {a: sleep 1}\npools: {a: sh}\n", `remuda.yaml:2:9: pool "a": an app has that name already`},
		{"numeric", "pools:\n  7: sh\n", `"7" is a number, which would be taken for an id`},
		{"null", "pools:\n  a: {run: sh, timeout: }\n", `timeout has no value`},
		{"empty", "pools:\n", `the file has no apps`},
	} {
		t.Run(c.name, func(t *testing.T) {
			t.Parallel()
			opts := circumstances(t)
			opts.Cwd = t.TempDir()
			_, _, err := Parse(t.Context(), "remuda.yaml", []byte(c.body), opts)
			if err == nil {
				t.Fatal("no error")
			}
			if got := strings.ReplaceAll(err.Error(), opts.Cwd, "DIR"); !strings.Contains(got, c.want) {
				t.Errorf("got  %s\nwant %s", got, c.want)
			}
		})
	}
}

func TestOnlyPools(t *testing.T) {
	opts := circumstances(t)
	opts.Only = []string{"p"}
	const text = "apps: {a: sleep 1}\npools: {p: sh, q: sh}\n"
	f, _, err := Parse(t.Context(), "remuda.yaml", []byte(text), opts)
	if err != nil || len(f.Apps) != 0 || len(f.Pools) != 1 || f.Pools[0].Name != "p" {
		t.Fatalf("%+v %v", f, err)
	}
	opts.Only = []string{"pp"}
	if _, _, err = Parse(t.Context(), "remuda.yaml", []byte(text), opts); err == nil || !strings.Contains(err.Error(), `did you mean`) {
		t.Fatal(err)
	}
}

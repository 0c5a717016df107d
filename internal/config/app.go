// Package config reads what a person writes — remuda.yaml, PM2 ecosystem
// files, Procfiles, .env files and command lines — and turns all of it into
// one normalized form, [App].
//
// Invariant: an App that leaves this package is complete and valid; no later
// floor fills in a default or checks a range again.
//
// It must never import anything above floor 0, start a supervised process or
// talk to the daemon.
package config

import "time"

// App is one named program and how it is to be run, complete and valid. It is
// what travels over the API and what the state file holds, so its JSON names
// are an interface.
type App struct {
	Name      string `json:"name"`
	Namespace string `json:"namespace"` // "default" where none was given

	// What to run. Command is the whole argv as it will be executed:
	// interpreter, its arguments, the script, the arguments. Command[0] is an
	// absolute path, or a bare name that is looked up in PATH of Env at each
	// start.
	Command []string `json:"command"`
	// Script is the program as a person names it (for show, and PM2's
	// pm_exec_path); Interpreter is "none" where Command[0] is Script.
	Script      string `json:"script"`
	Interpreter string `json:"interpreter"`
	Cwd         string `json:"cwd"` // absolute

	// Env is added to the base environment: where InheritEnv is set that of
	// the daemon (PATH, HOME, USER, LOGNAME, SHELL, LANG, LC_*, TZ, TMPDIR
	// only), else nothing.
	Env        map[string]string `json:"env,omitempty"`
	InheritEnv bool              `json:"inherit_env,omitempty"`
	// EnvKeys names the variables of Env that the file or command line gives
	// itself, sorted; the others were taken over from the caller's environment
	// and do not count in [Diff]. nil: all of Env is given; empty: none is.
	EnvKeys []string `json:"env_keys,omitzero"`

	Instances   int    `json:"instances"`              // ≥ 1, unless scaled to 0
	InstanceVar string `json:"instance_var,omitempty"` // default NODE_APP_INSTANCE
	// IncrementVar names a variable of Env whose integer value grows by one
	// from instance to instance ("" for none).
	IncrementVar string `json:"increment_var,omitempty"`
	ExecMode     string `json:"exec_mode"` // "fork" | "cluster"
	// Sticky: in cluster mode, a client's connections go to one instance as
	// long as that is there.
	Sticky bool `json:"sticky,omitempty"`
	// Sockets are opened for the app and handed to each of its processes.
	Sockets []Socket `json:"sockets,omitempty"`
	// MaxSurge is how many instances a reload replaces at a time, each by a new
	// one that must be ready before the old one is stopped: a number, or a
	// percentage of Instances (see [ResolveSurge]). "0": the old one is stopped
	// first. "": 1 where two runs of an instance can serve side by side, else 0.
	MaxSurge string `json:"max_surge,omitempty"`
	User     string `json:"user,omitempty"`
	Group    string `json:"group,omitempty"`
	Umask    string `json:"umask,omitempty"` // octal, "" = inherited

	Autostart bool `json:"autostart"` // false: added as stopped

	Restart   Restart           `json:"restart"`
	Stop      Stop              `json:"stop"`
	Ready     Probe             `json:"ready"`
	DependsOn map[string]string `json:"depends_on,omitempty"`     // app → "started" | "ready" | "completed"
	Strategy  string            `json:"strategy_group,omitempty"` // group of File.Groups it belongs to
	Watch     *Watch            `json:"watch,omitempty"`
	Logs      Logs              `json:"logs"`

	// Source is the file the app came from ("" for a command line).
	Source string `json:"source,omitempty"`
}

// Restart says when a run that ended is followed by another.
type Restart struct {
	Policy        string `json:"policy"` // "always" | "on-failure" | "never"
	StopExitCodes []int  `json:"stop_exit_codes,omitempty"`
	// MinUptime is the run time from which a run counts as stable: it resets
	// the backoff and, where Window is 0, the count of restarts.
	MinUptime Duration `json:"min_uptime"`
	// MaxRestarts within Window, then the app is errored; 0 Window: that many
	// unstable runs in a row (PM2's meaning). MaxRestarts < 0: no limit.
	MaxRestarts int      `json:"max_restarts"`
	Window      Duration `json:"window,omitempty"`
	// Delay is a fixed wait before each restart. BackoffInitial > 0 takes its
	// place by an exponential backoff with full jitter up to BackoffMax.
	Delay          Duration `json:"delay,omitempty"`
	BackoffInitial Duration `json:"backoff_initial,omitempty"`
	BackoffMax     Duration `json:"backoff_max,omitempty"`
	Cron           string   `json:"cron,omitempty"`       // 5 or 6 fields, or @every …; TZ= prefix allowed
	MaxMemory      int64    `json:"max_memory,omitempty"` // bytes of the whole tree, 0 = none
}

// Stop says how a run is ended.
type Stop struct {
	Signal  string   `json:"signal"` // "SIGTERM", …
	Grace   Duration `json:"grace"`  // from the signal to SIGKILL
	Message bool     `json:"message,omitempty"`
	// Message: send "shutdown" over the IPC channel in place of the signal.
}

// Probe says how readiness is seen. Exactly the fields of its Type are set.
type Probe struct {
	Type     string   `json:"type"`               // "none" | "ipc" | "notify" | "tcp" | "http" | "exec" | "log"
	Address  string   `json:"address,omitempty"`  // tcp: host:port
	URL      string   `json:"url,omitempty"`      // http
	Command  []string `json:"command,omitempty"`  // exec: ready when it exits 0
	Pattern  string   `json:"pattern,omitempty"`  // log: RE2, matched against each line
	Interval Duration `json:"interval,omitempty"` // tcp, http, exec; default 100ms
	// Timeout of the whole wait; default 3s from PM2 files, else 60s. With
	// "none" it is how long the new worker of a reload may take to listen; 0 is
	// 30s.
	Timeout Duration `json:"timeout,omitempty"`
	// OnTimeout: "fail" ends the run and counts it as failed; "online" takes
	// it as ready (PM2's meaning of listen_timeout).
	OnTimeout string `json:"on_timeout,omitempty"`
}

// Watch restarts an app when files change.
type Watch struct {
	Paths    []string `json:"paths"`            // absolute folders or files
	Ignore   []string `json:"ignore,omitempty"` // doublestar globs, relative to Cwd
	Debounce Duration `json:"debounce"`
}

// Logs says where output goes. Empty paths are the daemon's defaults under
// REMUDA_HOME/logs. "/dev/null" or "none" discards.
type Logs struct {
	Out        string   `json:"out,omitempty"`
	Err        string   `json:"err,omitempty"`
	Merge      bool     `json:"merge,omitempty"`       // all instances into one file
	Combine    bool     `json:"combine,omitempty"`     // stdout and stderr into Out
	TimeFormat string   `json:"time_format,omitempty"` // Go layout; "" = lines as they are
	JSON       bool     `json:"json,omitempty"`
	MaxSize    int64    `json:"max_size"`          // bytes; 0 = no rotation by size
	MaxAge     Duration `json:"max_age,omitempty"` // 0 = no rotation by time
	Keep       int      `json:"keep"`              // rotated files kept
	Compress   string   `json:"compress"`          // "none" | "gzip" | "zstd"
}

// Duration is a time.Duration that is written "1.5s" in JSON and YAML and
// also read from a bare number of milliseconds.
type Duration time.Duration

// Group ties the fates of apps together: what a restart of one means for its
// siblings. Groups nest by Parent.
type Group struct {
	Name        string   `json:"name"`
	Parent      string   `json:"parent,omitempty"`
	Strategy    string   `json:"strategy"`       // "one-for-one" | "one-for-all" | "rest-for-one"
	Apps        []string `json:"apps,omitempty"` // its apps, in the order rest-for-one goes by
	MaxRestarts int      `json:"max_restarts,omitempty"`
	Window      Duration `json:"window,omitempty"`
}

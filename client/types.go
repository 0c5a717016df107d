// Package client talks to a Remuda daemon: typed calls over its HTTP API.
//
// Invariant: this package and nothing else knows the paths and bodies of the
// API; the command line, the terminal UI and other programs all go through it.
//
// It must never import the daemon, the API server or anything that runs
// processes.
package client

import (
	"encoding/json"
	"time"

	"github.com/remuda-dev/remuda/internal/config"
)

// AppSpec is one app as it is to be run.
type AppSpec = config.App

// State is where an instance is in its life.
type State string

// The states of an instance.
const (
	Stopped  State = "stopped"
	Waiting  State = "waiting" // for a dependency
	Starting State = "starting"
	Online   State = "online"
	Unready  State = "unready"
	Stopping State = "stopping"
	Backoff  State = "backoff"
	Errored  State = "errored"
)

// Instance is one supervised process slot of an app.
type Instance struct {
	ID         int        `json:"id"`  // pm_id: unique in the daemon, kept for life
	App        string     `json:"app"` // the app's name
	Namespace  string     `json:"namespace"`
	Index      int        `json:"index"` // 0…instances-1
	State      State      `json:"state"`
	PID        int        `json:"pid"`   // 0 where nothing runs
	Since      time.Time  `json:"since"` // start of the run, or of the state where nothing runs
	Created    time.Time  `json:"created"`
	Restarts   int        `json:"restarts"` // all restarts since created or reset, asked for or not
	Unstable   int        `json:"unstable_restarts"`
	NextStart  *time.Time `json:"next_start,omitempty"` // in backoff: when it will be tried
	LastExit   *Exit      `json:"last_exit,omitempty"`
	Reason     string     `json:"reason,omitempty"`      // why it is errored, unready or in backoff, in words
	LastErr    []string   `json:"last_stderr,omitempty"` // last lines of stderr of the run that failed
	LogTrouble string     `json:"log_trouble,omitempty"` // why output could not be written, "" where it can
	LogLost    int64      `json:"log_lost_bytes,omitempty"`
	OutPath    string     `json:"out_path"`
	ErrPath    string     `json:"err_path"`
	CPU        float64    `json:"cpu"`    // percent of one core, of the whole tree, since the last look
	Memory     int64      `json:"memory"` // bytes of RSS, of the whole tree
	User       string     `json:"user"`
	Watching   bool       `json:"watching"`
	ExecMode   string     `json:"exec_mode"`
	Version    string     `json:"version,omitempty"` // from package.json beside the script
}

// Exit is how a run ended.
type Exit struct {
	Code   int       `json:"code"`             // -1 where a signal ended it
	Signal string    `json:"signal,omitempty"` // "SIGKILL", …
	At     time.Time `json:"at"`
	Cause  string    `json:"cause,omitempty"` // "oom", "memory limit", "probe", "stop", "spawn", …
	Error  string    `json:"error,omitempty"` // where nothing could be started: why
}

// Detail is everything known of one instance, for describe and jlist.
type Detail struct {
	Instance
	Spec AppSpec `json:"spec"`
	// Env is the environment the run has, secrets masked unless asked for.
	Env map[string]string `json:"env,omitempty"`
}

// Target chooses instances: a name, a numeric id, a namespace, /a regular
// expression/, "app:index", or "all".
type Target = string

// Verb is an action on targets.
type Verb string

// The verbs of [Client.Act].
const (
	VerbStart   Verb = "start" // an app that is known and stopped
	VerbStop    Verb = "stop"
	VerbRestart Verb = "restart"
	VerbReload  Verb = "reload"
	VerbDelete  Verb = "delete"
	VerbReset   Verb = "reset"  // counters to zero
	VerbFlush   Verb = "flush"  // empty the log files
	VerbReopen  Verb = "reopen" // reloadLogs: open log files anew
)

// ActRequest asks for an action on every instance a target matches.
type ActRequest struct {
	Verb    Verb              `json:"verb"`
	Targets []Target          `json:"targets"`
	Env     map[string]string `json:"env,omitempty"`    // start, restart, reload with --update-env
	Signal  string            `json:"signal,omitempty"` // not for reset, flush, reopen: overrides the stop signal
	// MaxSurge goes over the apps' own for this reload: "2", "25%"; "0" stops
	// each old instance first.
	MaxSurge string `json:"max_surge,omitempty"`
}

// SignalRequest sends a signal to the processes of targets.
type SignalRequest struct {
	Targets []Target `json:"targets"`
	Signal  string   `json:"signal"`
}

// MessageRequest sends a message to the Node programs of targets, which get it
// by process.on('message').
type MessageRequest struct {
	Targets []Target        `json:"targets"`
	Message json.RawMessage `json:"message"` // any JSON value, at most 1 MiB
	// Reply, unless it is "", is the name of a custom action of @pm2/io, whose
	// reply (a message of the type axm:reply) is waited for and becomes
	// [Outcome.Reply]. WaitMS is for how many milliseconds, at most ten minutes.
	Reply  string `json:"reply,omitempty" maxLength:"1000"`
	WaitMS int    `json:"wait_ms,omitempty" minimum:"0" maximum:"600000"`
}

// StartRequest adds apps, or brings ones of the same name to a new spec, and
// starts them.
type StartRequest struct {
	Apps  []AppSpec  `json:"apps"`
	Pools []PoolSpec `json:"pools,omitempty"`
	// Force adds a further app under a name that is taken (PM2's --force).
	Force bool `json:"force,omitempty"`
}

// UpRequest makes what runs of one source file equal the file.
type UpRequest struct {
	Source string     `json:"source"` // apps and pools of this source that are not given are deleted
	Apps   []AppSpec  `json:"apps"`
	Pools  []PoolSpec `json:"pools,omitempty"`
	Groups []Group    `json:"groups,omitempty"`
	DryRun bool       `json:"dry_run,omitempty"`
}

// Group is a restart strategy over several apps.
type Group = config.Group

// Change is one line of the difference that up applies.
type Change struct {
	App    string   `json:"app"`              // or the pool
	Pool   bool     `json:"pool,omitempty"`   // it is about a pool
	Action string   `json:"action"`           // "add" | "change" | "scale" | "start" | "remove" | "none"
	Fields []string `json:"fields,omitempty"` // for change: "env.PORT: 80 → 81", …
}

// ActResult is what became of each instance and pool an action touched.
type ActResult struct {
	Instances []Outcome     `json:"instances"`
	Pools     []PoolOutcome `json:"pools,omitempty"`
	Changes   []Change      `json:"changes,omitempty"`
	Warnings  []string      `json:"warnings,omitempty"`
}

// Outcome is one instance after an action; Error says in words why what was
// asked did not come about ("" where it did).
type Outcome struct {
	Instance
	Error string          `json:"error,omitempty"`
	Reply json.RawMessage `json:"reply,omitempty"` // to a message; see [MessageRequest]
}

// ScaleRequest sets an app's number of instances: "4", "+2", "-1", "max".
type ScaleRequest struct {
	App string `json:"app"`
	To  string `json:"to"`
}

// Info describes the daemon.
type Info struct {
	Version            string    `json:"version"`
	API                int       `json:"api"` // grows when an older client can no longer be served
	PID                int       `json:"pid"`
	KeeperPID          int       `json:"keeper_pid"`
	Started            time.Time `json:"started"` // of the keeper
	ControllerAt       time.Time `json:"controller_started"`
	ControllerRestarts int       `json:"controller_restarts"`
	Home               string    `json:"home"`
	Instances          int       `json:"instances"`
	Online             int       `json:"online"`
	Pools              int       `json:"pools,omitempty"`
	Cgroup             string    `json:"cgroup"` // "v2", "v2 without controllers + v1 memory", "none: …"
	Warnings           []string  `json:"warnings,omitempty"`
}

// LogQuery chooses log lines.
type LogQuery struct {
	Targets []Target  `json:"targets,omitempty"` // none: all
	Lines   int       `json:"lines"`             // last N of each file; < 0: all
	Since   time.Time `json:"since,omitzero"`
	Until   time.Time `json:"until,omitzero"`
	Grep    string    `json:"grep,omitempty"` // RE2
	Out     bool      `json:"out,omitempty"`  // neither: both
	Err     bool      `json:"err,omitempty"`
	Follow  bool      `json:"follow,omitempty"`
}

// LogLine is one line of output.
type LogLine struct {
	Time   time.Time `json:"time"` // when it was read; to about 100 ms unless the log carries its own times
	App    string    `json:"app"`
	ID     int       `json:"id"`
	Stream string    `json:"stream"`        // "out" | "err"
	Text   string    `json:"text"`          // without its newline; invalid UTF-8 as U+FFFD
	Cut    bool      `json:"cut,omitempty"` // the line goes on in the next
}

// Event is one change of state.
type Event struct {
	Seq    uint64            `json:"seq"`
	Time   time.Time         `json:"time"`
	Type   string            `json:"type"` // "app.online", "app.exit", "app.errored", "log.trouble", "daemon.started", …
	App    string            `json:"app,omitempty"`
	ID     int               `json:"id"` // -1 where it is no instance's
	PID    int               `json:"pid,omitempty"`
	Text   string            `json:"text"`
	Fields map[string]string `json:"fields,omitempty"`
}

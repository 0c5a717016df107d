package config

import (
	"runtime"
	"slices"
	"time"
)

const (
	maxInstances         = 10_000
	defaultInstanceVar   = "NODE_APP_INSTANCE"
	defaultBackoff       = Duration(100 * time.Millisecond)
	defaultBackoffMax    = Duration(15 * time.Second) // PM2's cap as well
	defaultMaxRestarts   = 16
	defaultWindow        = Duration(5 * time.Minute)
	defaultMinUptime     = Duration(time.Second)
	defaultGrace         = Duration(10 * time.Second)
	defaultReadyTimeout  = Duration(60 * time.Second)
	defaultProbeInterval = Duration(100 * time.Millisecond)
	defaultDebounce      = Duration(200 * time.Millisecond)

	pm2ListenTimeout = Duration(3 * time.Second)
	pm2KillTimeout   = Duration(1600 * time.Millisecond)
	pm2TimeFormat    = "2006-01-02T15:04:05" // of time: true
	isoMillis        = "2006-01-02T15:04:05.000Z07:00"
)

// defaultLogs is the same for every format: rotation is on.
func defaultLogs() Logs {
	return Logs{MaxSize: 50 << 20, Keep: 5, Compress: "none"}
}

// defaultRestart is remuda.yaml's; PM2's is in pm2.go.
func defaultRestart() Restart {
	return Restart{
		Policy:         "always",
		MinUptime:      defaultMinUptime,
		MaxRestarts:    defaultMaxRestarts,
		Window:         defaultWindow,
		BackoffInitial: defaultBackoff,
		BackoffMax:     defaultBackoffMax,
	}
}

func cpus() int { return runtime.NumCPU() }

// finishWatch completes w and puts it into a.
func finishWatch(a *App, w *Watch) {
	if len(w.Paths) == 0 {
		w.Paths = []string{a.Cwd}
	}
	if w.Ignore == nil {
		w.Ignore = []string{"**/.*", "**/.*/**", "**/node_modules", "**/node_modules/**"}
	}
	// An app that logs into a folder it watches would restart for ever.
	for _, out := range []string{a.Logs.Out, a.Logs.Err} {
		if rel, ok := relativeTo(a.Cwd, out); ok && out != discard {
			if g := globQuote(rel) + "*"; !slices.Contains(w.Ignore, g) {
				w.Ignore = append(slices.Clip(w.Ignore), g)
			}
		}
	}
	a.Watch = w
}

package cli

import (
	"encoding/json"
	"fmt"
	"math"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"github.com/remuda-dev/remuda/client"
)

// encode prints v as JSON, whatever standard output is.
func (c *cli) encode(v any, indent bool) error {
	enc := json.NewEncoder(c.Stdout)
	enc.SetEscapeHTML(false)
	if indent {
		enc.SetIndent("", "  ")
	}
	return enc.Encode(v)
}

// pm2Status is the word PM2 has for a state. An app that runs but is not
// ready is "launching", so that a script that waits for "online" waits on.
func pm2Status(s client.State) string {
	switch s {
	case client.Waiting, client.Starting, client.Unready:
		return "launching"
	case client.Backoff:
		return "waiting restart"
	}
	return string(s)
}

func milliseconds(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixMilli()
}

// commandParts takes an argv apart into what stands before the script (the
// interpreter's arguments) and after it.
func commandParts(spec *client.AppSpec) (before, after []string) {
	cmd := spec.Command
	if len(cmd) == 0 {
		return []string{}, []string{}
	}
	at := 0
	if spec.Interpreter != "none" && spec.Interpreter != "" {
		abs := scriptPath(spec)
		if k := slices.IndexFunc(cmd[1:], func(s string) bool { return s == spec.Script || s == abs }); k >= 0 {
			at = k + 1
		}
	}
	before, after = []string{}, notNil(slices.Clone(cmd[at+1:]))
	if at > 1 {
		before = slices.Clone(cmd[1:at])
	}
	return before, after
}

func scriptPath(spec *client.AppSpec) string {
	if filepath.IsAbs(spec.Script) || spec.Script == "" {
		return spec.Script
	}
	if spec.Interpreter == "none" && len(spec.Command) > 0 && filepath.IsAbs(spec.Command[0]) {
		return spec.Command[0]
	}
	return filepath.Join(spec.Cwd, spec.Script)
}

// pm2Process is one element of `pm2 jlist`.
func pm2Process(d *client.Detail, home string) map[string]any {
	spec := &d.Spec
	nodeArgs, args := commandParts(spec)
	var watch any = false
	ignore := []string{}
	if spec.Watch != nil {
		watch = true
		if len(spec.Watch.Paths) > 0 {
			watch = spec.Watch.Paths
		}
		ignore = notNil(spec.Watch.Ignore)
	}
	env := map[string]string{}
	for k, v := range d.Env {
		env[k] = v
	}
	if d.Env == nil {
		for k, v := range spec.Env {
			env[k] = v
		}
	}
	exitCode, exitSignal := 0, ""
	if d.LastExit != nil {
		exitCode, exitSignal = max(d.LastExit.Code, 0), d.LastExit.Signal
	}
	version := d.Version
	if version == "" {
		version = "N/A"
	}
	instanceVar := spec.InstanceVar
	if instanceVar == "" {
		instanceVar = "NODE_APP_INSTANCE"
	}
	e := map[string]any{}
	// PM2 spreads the environment over pm2_env, its own fields on top.
	for k, v := range env {
		e[k] = v
	}
	for k, v := range map[string]any{
		"name": d.App, "namespace": d.Namespace, "status": pm2Status(d.State), "pm_id": d.ID,
		"restart_time": d.Restarts, "unstable_restarts": d.Unstable,
		"created_at": milliseconds(d.Created), "pm_uptime": milliseconds(d.Since),
		"pm_exec_path": scriptPath(spec), "pm_cwd": spec.Cwd, "exec_interpreter": spec.Interpreter,
		"exec_mode": spec.ExecMode + "_mode", "instances": spec.Instances,
		"node_args": nodeArgs, "args": args,
		"watch": watch, "ignore_watch": ignore, "autorestart": spec.Restart.Policy != "never", "autostart": spec.Autostart,
		"env": env, "filter_env": []string{},
		"pm_out_log_path": d.OutPath, "pm_err_log_path": d.ErrPath,
		"pm_pid_path":        filepath.Join(home, "pids", d.App+"-"+strconv.Itoa(d.ID)+".pid"),
		"axm_actions":        []any{},
		"axm_monitor":        map[string]any{},
		"axm_options":        map[string]any{},
		"axm_dynamic":        map[string]any{},
		"exit_code":          exitCode,
		"exit_signal":        exitSignal,
		"merge_logs":         spec.Logs.Merge,
		"version":            version,
		"node_version":       "N/A",
		"username":           d.User,
		"vizion":             false,
		"vizion_running":     false,
		"treekill":           true,
		"pmx":                false,
		"km_link":            false,
		"automation":         true,
		"windowsHide":        true,
		"instance_var":       instanceVar,
		instanceVar:          d.Index,
		"kill_timeout":       time.Duration(spec.Stop.Grace).Milliseconds(),
		"max_restarts":       spec.Restart.MaxRestarts,
		"min_uptime":         time.Duration(spec.Restart.MinUptime).Milliseconds(),
		"restart_delay":      time.Duration(spec.Restart.Delay).Milliseconds(),
		"prev_restart_delay": 0,
		"unique_id":          fmt.Sprintf("%d-%d", d.ID, milliseconds(d.Created)),
	} {
		e[k] = v
	}
	if spec.Restart.MaxMemory > 0 {
		e["max_memory_restart"] = spec.Restart.MaxMemory
	}
	if spec.Restart.Cron != "" {
		e["cron_restart"] = spec.Restart.Cron
	}
	return map[string]any{
		"pid": d.PID, "name": d.App, "pm_id": d.ID, "pm2_env": e,
		"monit": map[string]any{"memory": d.Memory, "cpu": math.Round(d.CPU*10) / 10},
	}
}

package main

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// The writers print "seq N" in order from 1, in bursts and single lines, now
// and then a line in two pieces. On SIGTERM they finish the line and leave its
// number in NAME.end.
const (
	writerSh = `i=0
trap 'echo $i >"$NAME.end"; exit 0' TERM
while :; do
	n=0
	while [ $n -lt 20 ]; do i=$((i+1)); n=$((n+1)); echo "seq $i"; done
	sleep 0.02
done
`
	writerPy = `import os, random, signal, sys, time
stop = False
def on_term(*_):
    global stop
    stop = True
signal.signal(signal.SIGTERM, on_term)
i = 0
def put(s):
    b = s.encode()
    while b:
        b = b[os.write(1, b):]
while not stop:
    how = random.random()
    if how < 0.3:
        i += 1
        line = f"seq {i}\n"
        put(line[:5]); time.sleep(0.004); put(line[5:])
    elif how < 0.4:
        for _ in range(300):
            i += 1
            put(f"seq {i}\n")
    else:
        out = []
        for _ in range(random.randrange(1, 60)):
            i += 1
            out.append(f"seq {i}\n")
        put("".join(out))
    time.sleep(random.random() * 0.01)
open(os.environ["NAME"] + ".end", "w").write(str(i))
`
	writerNode = `const fs = require('fs')
let i = 0
const step = () => {
  let s = ''
  for (let n = 1 + Math.floor(Math.random() * 80); n > 0; n--) s += 'seq ' + (++i) + '\n'
  const cut = Math.random() < 0.2 ? s.length - 3 : s.length
  process.stdout.write(s.slice(0, cut))
  if (cut < s.length) process.stdout.write(s.slice(cut))
}
let t = setInterval(step, 8)
process.on('SIGTERM', () => {
  clearInterval(t)
  process.stdout.write('', () => { fs.writeFileSync(process.env.NAME + '.end', String(i)); process.exit(0) })
})
`
	idleNode = `setInterval(() => {}, 1 << 30)
`
	// exit3 ends with code 3 as soon as the controller named in ctl.pid is
	// dead: before there is another. It keeps its own account.
	exit3 = `import os, select, sys, time
me = os.environ["NAME"]
def note(s):
    with open(me + ".account", "a") as f:
        f.write(s + "\n")
note(f"start {os.getpid()}")
while True:
    try:
        pid = int(open("ctl.pid").read())
        fd = os.pidfd_open(pid)
    except (OSError, ValueError):
        time.sleep(0.002)
        continue
    p = select.poll()
    p.register(fd, select.POLLIN)
    p.poll()
    note("exit 3")
    os._exit(3)
`
	forker = `import subprocess, time
subprocess.Popen(["sleep", "1000001"])
subprocess.Popen(["setsid", "-f", "sleep", "1000002"])
subprocess.Popen(["sh", "-c", "sleep 1000003 & sleep 1000004"])
while True:
    time.sleep(1000)
`
)

// isSteady says whether an app's process has to live through everything that
// is done to the controller.
func isSteady(app string) bool {
	switch app {
	case "never", "exit3", "once3", "busy":
		return false
	}
	return true
}

// apps writes the programs and returns their specs; sleep.json and busy.json
// are for the command line.
func (c *campaign) apps() ([]client.AppSpec, error) {
	sh, err := exec.LookPath("sh")
	if err != nil {
		return nil, err
	}
	py, err := exec.LookPath("python3")
	if err != nil {
		return nil, err
	}
	node, err := exec.LookPath("node")
	if err != nil {
		return nil, err
	}
	var out []client.AppSpec
	for _, a := range []struct {
		name, interpreter, file, text string
		change                        func(*client.AppSpec)
	}{
		{"writer-sh", sh, "writer.sh", writerSh, nil},
		{"writer-py", py, "writer.py", writerPy, nil},
		{"writer-node", node, "writer.js", writerNode, nil},
		{"rotated", py, "writer.py", writerPy, func(a *client.AppSpec) { a.Logs.MaxSize, a.Logs.Keep = 32<<10, 100000 }},
		{"stamped", py, "writer.py", writerPy, func(a *client.AppSpec) { a.Logs.TimeFormat = time.RFC3339Nano }},
		{"idle", node, "idle.js", idleNode, nil},
		{"forker", py, "forker.py", forker, nil},
		{"exit3", py, "exit3.py", exit3, func(a *client.AppSpec) {
			a.Restart.MaxRestarts, a.Restart.MinUptime = -1, config.Duration(time.Millisecond)
		}},
		{"once3", py, "exit3.py", exit3, func(a *client.AppSpec) { a.Restart.Policy = "never" }},
		{"never", sh, "never.sh", "exec sleep 1000000\n", nil},
	} {
		path, err := c.home.Write(a.file, a.text)
		if err != nil {
			return nil, err
		}
		spec := client.AppSpec{
			Name: a.name, Namespace: "default",
			Command: []string{a.interpreter, path}, Script: path, Interpreter: a.interpreter,
			Cwd: c.home.Dir, Env: map[string]string{"NAME": a.name, "CAMPAIGN": c.mark + ":" + a.name}, InheritEnv: true,
			Instances: 1, InstanceVar: "NODE_APP_INSTANCE", ExecMode: "fork", Autostart: true,
			Restart: config.Restart{Policy: "always", MinUptime: config.Duration(time.Second), MaxRestarts: 16},
			Stop:    config.Stop{Signal: "SIGTERM", Grace: config.Duration(10 * time.Second)},
			Ready:   config.Probe{Type: "none"},
			Logs:    config.Logs{MaxSize: 1 << 30, Keep: 10, Compress: "none"},
		}
		if a.change != nil {
			a.change(&spec)
		}
		out = append(out, spec)
	}
	for name, instances := range map[string]int{"sleep": 1, "busy": 1} {
		script := "sleep"
		if name == "busy" {
			if script, err = c.home.Write("busy.sh", "exec sleep 1000005\n"); err != nil {
				return nil, err
			}
		}
		surge := map[string]int{"sleep": 0, "busy": 1}[name] // a reload of busy is by a second run
		file, err := json.Marshal(map[string]any{"apps": []any{map[string]any{
			"name": name, "script": script, "args": map[string]any{"sleep": "1000000", "busy": ""}[name],
			"interpreter": map[string]any{"sleep": "none", "busy": sh}[name],
			"cwd":         c.home.Dir, "instances": instances, "kill_timeout": 3000, "max_surge": surge,
			"env": map[string]string{"NAME": name, "CAMPAIGN": c.mark + ":" + name},
		}}})
		if err != nil {
			return nil, err
		}
		if _, err := c.home.Write(name+".json", string(file)); err != nil {
			return nil, err
		}
	}
	return out, nil
}

// leaderWord is a word of the command line that tells an app's own process
// from its children.
func (c *campaign) leaderWord(app string) string {
	switch app {
	case "sleep", "never":
		return "1000000"
	case "busy":
		return "1000005"
	}
	return filepath.Join(c.home.Dir, map[string]string{
		"writer-sh": "writer.sh", "writer-py": "writer.py", "writer-node": "writer.js",
		"rotated": "writer.py", "stamped": "writer.py", "idle": "idle.js", "forker": "forker.py",
		"exit3": "exit3.py", "once3": "exit3.py",
	}[app])
}

func (c *campaign) env(app string) string { return fmt.Sprintf("%s:%s", c.mark, app) }

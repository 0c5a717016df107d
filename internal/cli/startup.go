package cli

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"os/user"
	"path/filepath"
	"strconv"
	"strings"

	"github.com/spf13/cobra"
)

// Names of init systems.
const (
	initSystemd = "systemd"
	initOpenRC  = "openrc"
)

// service is what startup sets up: one daemon of one user, started with the
// machine (or with the user's session manager).
type service struct {
	system  string // initSystemd or initOpenRC
	user    *user.User
	perUser bool   // a unit of the user's own systemd
	home    string // the daemon's folder
	binary  string
	path    string // PATH of the daemon
	// running: a daemon runs already, outside of the service.
	running bool
}

// step is one thing that startup or unstartup does.
type step struct {
	write   string // path of a file to write
	content string
	mode    fs.FileMode
	remove  string   // path of a file to remove
	run     []string // a command to run
	mayFail bool     // the command is run as far as it goes
}

func (s *service) name() string {
	if s.perUser {
		return "remuda"
	}
	return "remuda-" + s.user.Username
}

// file is where the unit or script goes.
func (s *service) file(configHome string) string {
	switch {
	case s.system == initOpenRC:
		return "/etc/init.d/" + s.name()
	case s.perUser:
		if configHome == "" {
			configHome = filepath.Join(s.user.HomeDir, ".config")
		}
		return filepath.Join(configHome, "systemd/user", s.name()+".service")
	}
	return "/etc/systemd/system/" + s.name() + ".service"
}

// unitWord writes a string as one word of a unit file.
func unitWord(s string) string {
	s = strings.NewReplacer(`\`, `\\`, `"`, `\"`, `%`, `%%`, "\n", `\n`, "\t", `\t`).Replace(s)
	return `"` + s + `"`
}

// unit is the systemd unit.
func (s *service) unit() string {
	var b strings.Builder
	b.WriteString("# Written by `remuda startup`; `remuda unstartup` removes it.\n[Unit]\n")
	fmt.Fprintf(&b, "Description=Remuda process supervisor (%s)\nDocumentation=https://github.com/remuda-dev/remuda\n", s.user.Username)
	if !s.perUser {
		b.WriteString("Wants=network-online.target\nAfter=network-online.target\n")
	}
	b.WriteString("# However often it ends, it is started again.\nStartLimitIntervalSec=0\n\n[Service]\nType=notify\nNotifyAccess=main\n")
	if !s.perUser {
		fmt.Fprintf(&b, "User=%s\n", s.user.Username)
	}
	fmt.Fprintf(&b, "Environment=%s\nEnvironment=%s\n", unitWord("PATH="+s.path), unitWord("REMUDA_HOME="+s.home))
	fmt.Fprintf(&b, "ExecStart=%s daemon\nExecReload=%s upgrade\n", unitWord(s.binary), unitWord(s.binary))
	b.WriteString(`Restart=always
RestartSec=1
WatchdogSec=60
# The daemon stops its apps itself, in their order: only it gets the signal.
# What is left when it has ended is killed, so that nothing runs twice after a
# restart.
KillMode=mixed
TimeoutStopSec=120
# The daemon keeps each app in a cgroup of its own below this one, and an app
# that runs out of memory must not take the others with it.
Delegate=yes
OOMPolicy=continue
TasksMax=infinity
LimitNOFILE=1048576

[Install]
`)
	if s.perUser {
		b.WriteString("WantedBy=default.target\n")
	} else {
		b.WriteString("WantedBy=multi-user.target\n")
	}
	return b.String()
}

// shellWord quotes for sh.
func shellWord(s string) string { return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'" }

// script is the OpenRC service script.
func (s *service) script() string {
	return fmt.Sprintf(`#!/sbin/openrc-run
# Written by "remuda startup"; "remuda unstartup" removes it.

name="Remuda (%[1]s)"
description="Remuda process supervisor"
extra_started_commands="reload"

supervisor=supervise-daemon
command=%[2]s
command_args=daemon
command_user=%[3]s
respawn_delay=1
respawn_max=0
# The daemon stops its apps itself, in their order.
retry="TERM/120/KILL/5"
rc_ulimit="-n 1048576"
rc_cgroup_cleanup=yes

export PATH=%[4]s
export REMUDA_HOME=%[5]s

depend() {
	need localmount
	use net
	after firewall
}

reload() {
	ebegin "Upgrading the daemon of Remuda"
	su -s /bin/sh -c 'exec "$0" upgrade' "$command_user" -- "$command"
	eend $?
}
`, s.user.Username, shellWord(s.binary), shellWord(s.user.Username), shellWord(s.path), shellWord(s.home))
}

func (s *service) systemctl(args ...string) []string {
	if s.perUser {
		return append([]string{"systemctl", "--user"}, args...)
	}
	return append([]string{"systemctl"}, args...)
}

// install are the steps of startup.
func (s *service) install(configHome string) []step {
	file := s.file(configHome)
	if s.system == initOpenRC {
		steps := []step{
			{write: file, content: s.script(), mode: 0o755},
			{run: []string{"rc-update", "add", s.name(), "default"}},
		}
		if !s.running {
			steps = append(steps, step{run: []string{"rc-service", s.name(), "start"}})
		}
		return steps
	}
	enable := s.systemctl("enable", "--now", s.name()+".service")
	if s.running {
		enable = s.systemctl("enable", s.name()+".service")
	}
	return []step{
		{write: file, content: s.unit(), mode: 0o644},
		{run: s.systemctl("daemon-reload")},
		{run: enable},
	}
}

// uninstall are the steps of unstartup.
func (s *service) uninstall(configHome string) []step {
	file := s.file(configHome)
	if s.system == initOpenRC {
		return []step{
			{run: []string{"rc-service", s.name(), "stop"}, mayFail: true},
			{run: []string{"rc-update", "del", s.name(), "default"}, mayFail: true},
			{remove: file},
		}
	}
	return []step{
		{run: s.systemctl("disable", "--now", s.name()+".service"), mayFail: true},
		{remove: file},
		{run: s.systemctl("daemon-reload")},
	}
}

func (c *cli) startupCommand() *cobra.Command {
	return c.serviceCommand("startup", "Start the daemon with the machine", `Write a service for this machine's init system and enable it, so that the daemon and
its apps come back after a reboot. As root the service is the system's (for the
user of -u); as another user it is a unit of the user's own systemd.

The daemon remembers what shall run; save is not needed for it.`,
		`  remuda startup --dry-run
  sudo remuda startup -u deploy
  remuda startup openrc --dry-run`,
		func(ctx context.Context, s *service) error {
			if err := c.carryOut(ctx, s.install(c.getenv("XDG_CONFIG_HOME"))); err != nil {
				return err
			}
			c.printf("The service %s starts the daemon of %s in %s with the machine.\n", s.name(), s.user.Username, s.home)
			if s.perUser {
				c.printf("A user's services run from login to logout; `loginctl enable-linger %s` has them run from boot on.\n", s.user.Username)
			}
			if s.running {
				c.printf("A daemon runs already and was left alone: the service takes over after a reboot, or after `remuda kill` and `%s`.\n", strings.Join(s.startWords(), " "))
			}
			return nil
		}, (*service).install)
}

func (s *service) startWords() []string {
	if s.system == initOpenRC {
		return []string{"rc-service", s.name(), "start"}
	}
	return s.systemctl("start", s.name())
}

func (c *cli) unstartupCommand() *cobra.Command {
	return c.serviceCommand("unstartup", "Undo startup", "Disable and remove the service that startup made. The daemon it runs, and its apps,\nare stopped.",
		`  remuda unstartup --dry-run
  sudo remuda unstartup -u deploy`,
		func(ctx context.Context, s *service) error {
			file := s.file(c.getenv("XDG_CONFIG_HOME"))
			if _, err := os.Lstat(file); errors.Is(err, fs.ErrNotExist) {
				return fmt.Errorf("there is no service to remove: %s does not exist", file)
			}
			if err := c.carryOut(ctx, s.uninstall(c.getenv("XDG_CONFIG_HOME"))); err != nil {
				return err
			}
			c.printf("The service %s is gone.\n", s.name())
			return nil
		}, (*service).uninstall)
}

func (c *cli) serviceCommand(name, short, long, example string, do func(context.Context, *service) error, plan func(*service, string) []step) *cobra.Command {
	cmd := &cobra.Command{
		Use:     name + " [systemd|openrc]",
		GroupID: groupMachine,
		Short:   short,
		Long:    long,
		Example: example,
		Args:    takes(0, 1),
		ValidArgsFunction: func(*cobra.Command, []string, string) ([]string, cobra.ShellCompDirective) {
			return []string{initSystemd, initOpenRC}, cobra.ShellCompDirectiveNoFileComp
		},
	}
	dry := cmd.Flags().Bool("dry-run", false, "print the files and commands, and change nothing")
	who := cmd.Flags().StringP("user", "u", "", "the `user` whose daemon it is (as root)")
	hp := cmd.Flags().String("hp", "", "that user's home `folder`; the daemon's is .remuda in it")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		asked := ""
		if len(args) > 0 {
			asked = args[0]
		}
		s, err := c.service(ctx, asked, *who, *hp, *dry)
		if err != nil {
			return err
		}
		if *dry {
			steps := plan(s, c.getenv("XDG_CONFIG_HOME"))
			if c.json {
				return c.writeJSON(planJSON(steps))
			}
			c.printf("%s", planText(steps))
			return nil
		}
		return do(ctx, s)
	})
	return cmd
}

// service works out whose service is meant and which init system runs it.
func (c *cli) service(ctx context.Context, asked, who, hp string, dry bool) (*service, error) {
	s := &service{path: c.getenv("PATH")}
	if s.path == "" {
		s.path = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
	}
	found := initSystem()
	switch asked {
	case "", initSystemd, initOpenRC:
	default:
		return nil, usage("usage: remuda startup [systemd|openrc]", "%q is none of the init systems this can set up: systemd, openrc", clip(asked))
	}
	s.system = asked
	if asked == "" {
		s.system = found
	}
	switch {
	case s.system == "":
		return nil, hinted{errors.New("neither systemd nor OpenRC runs this machine (is it a container?)"),
			"Have whatever starts it run `remuda daemon`, which stays in the foreground; `remuda startup systemd --dry-run` prints a unit to start from."}
	case found != s.system && !dry:
		return nil, hinted{fmt.Errorf("%s does not run this machine", s.system),
			"`--dry-run` prints the files, to be installed by hand where it does; in a container run `remuda daemon`."}
	}
	me, err := user.Current()
	if err != nil {
		return nil, fmt.Errorf("cannot tell who you are: %w", err)
	}
	s.user = me
	if who != "" && who != me.Username {
		if me.Uid != "0" {
			return nil, fmt.Errorf("only root can set up a service of the user %q", clip(who))
		}
		if s.user, err = user.Lookup(who); err != nil {
			return nil, fmt.Errorf("cannot set up a service: %w", err)
		}
	}
	s.perUser = s.system == initSystemd && me.Uid != "0"
	if s.system == initOpenRC && me.Uid != "0" && !dry {
		return nil, hinted{errors.New("OpenRC's services are root's matter"),
			fmt.Sprintf("sudo env PATH=\"$PATH\" %s startup openrc -u %s --hp %s", quote(s.binaryPath()), me.Username, quote(me.HomeDir))}
	}
	switch {
	case hp != "":
		if hp, err = c.abs(hp); err != nil {
			return nil, err
		}
		s.home = filepath.Join(hp, ".remuda")
	case c.home == "" && s.user != me:
		s.home = filepath.Join(s.user.HomeDir, ".remuda")
	default:
		s.home = c.client.Home()
	}
	if strings.ContainsFunc(s.home+s.path, func(r rune) bool { return r < ' ' }) {
		return nil, fmt.Errorf("the daemon's folder %q or PATH has control characters and cannot be put into a service", clip(s.home))
	}
	s.binary = s.binaryPath()
	if s.home == c.client.Home() {
		ctx, cancel := context.WithTimeout(ctx, patience)
		defer cancel()
		_, err := c.client.Info(ctx)
		s.running = err == nil
	}
	return s, nil
}

// binaryPath is this program: by the name it has in PATH, where it is there, so
// that a package's update is followed.
func (s *service) binaryPath() string {
	self, err := os.Executable()
	if err != nil {
		return "/usr/local/bin/remuda"
	}
	if named, err := exec.LookPath(filepath.Base(os.Args[0])); err == nil && filepath.IsAbs(named) {
		a, aerr := os.Stat(named)
		b, berr := os.Stat(self)
		if aerr == nil && berr == nil && os.SameFile(a, b) {
			return named
		}
	}
	return self
}

// initSystem is the init system that runs this machine, "" for none known.
func initSystem() string {
	if st, err := os.Stat("/run/systemd/system"); err == nil && st.IsDir() {
		return initSystemd
	}
	if st, err := os.Stat("/run/openrc"); err == nil && st.IsDir() {
		return initOpenRC
	}
	return ""
}

func planText(steps []step) string {
	var b strings.Builder
	for _, s := range steps {
		switch {
		case s.write != "":
			fmt.Fprintf(&b, "# would write %s (mode %04o):\n%s\n", s.write, s.mode, s.content)
		case s.remove != "":
			fmt.Fprintf(&b, "# would remove %s\n", s.remove)
		default:
			fmt.Fprintf(&b, "# would run: %s\n", commandLine(s.run))
		}
	}
	return b.String()
}

func planJSON(steps []step) []map[string]any {
	out := []map[string]any{}
	for _, s := range steps {
		switch {
		case s.write != "":
			out = append(out, map[string]any{"write": s.write, "mode": fmt.Sprintf("%04o", s.mode), "content": s.content})
		case s.remove != "":
			out = append(out, map[string]any{"remove": s.remove})
		default:
			out = append(out, map[string]any{"run": s.run})
		}
	}
	return out
}

func (c *cli) carryOut(ctx context.Context, steps []step) error {
	for _, s := range steps {
		var err error
		switch {
		case s.write != "":
			err = writeService(s)
		case s.remove != "":
			if err = os.Remove(s.remove); errors.Is(err, fs.ErrNotExist) {
				err = nil
			}
		default:
			err = runStep(ctx, s.run)
			if err != nil && s.mayFail && ctx.Err() == nil {
				c.warn(err.Error())
				err = nil
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// writeService writes a file whole or not at all.
func writeService(s step) error {
	if err := os.MkdirAll(filepath.Dir(s.write), 0o755); err != nil {
		return fmt.Errorf("cannot write the service: %w", err)
	}
	tmp, err := os.CreateTemp(filepath.Dir(s.write), ".remuda-"+strconv.Itoa(os.Getpid())+"-*")
	if err != nil {
		return fmt.Errorf("cannot write the service: %w; run it as root (sudo)", err)
	}
	defer os.Remove(tmp.Name())
	_, err = tmp.WriteString(s.content)
	err = errors.Join(err, tmp.Chmod(s.mode), tmp.Close())
	if err == nil {
		err = os.Rename(tmp.Name(), s.write)
	}
	if err != nil {
		return fmt.Errorf("cannot write the service: %w", err)
	}
	return nil
}

func runStep(ctx context.Context, argv []string) error {
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		said := strings.TrimSpace(string(bytes.ToValidUTF8(out, []byte("�"))))
		if said != "" {
			said = ": " + said
		}
		return fmt.Errorf("`%s` failed (%w)%s", strings.Join(argv, " "), err, said)
	}
	return nil
}

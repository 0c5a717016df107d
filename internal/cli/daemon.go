package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
)

func (c *cli) pingCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "ping",
		GroupID: groupDaemon,
		Short:   "See whether the daemon answers",
		Example: `  remuda ping && echo it runs`,
		Args:    takes(0, 0),
		RunE: c.run(needClient, func(ctx context.Context, _ []string) error {
			info, err := c.client.Info(ctx)
			if err != nil {
				return err
			}
			if c.json {
				return c.writeJSON(info)
			}
			c.printf("pong\n")
			return nil
		}),
	}
}

func (c *cli) killCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "kill",
		GroupID: groupDaemon,
		Short:   "Stop every app and end the daemon",
		Example: `  remuda kill`,
		Args:    takes(0, 0),
		RunE: c.run(needClient, func(ctx context.Context, _ []string) error {
			err := c.client.Kill(ctx)
			gone := errors.Is(err, client.ErrUnreachable) && !errors.Is(err, os.ErrPermission)
			if err != nil && !gone {
				return err
			}
			switch {
			case c.json:
				return c.writeJSON(map[string]bool{"killed": !gone})
			case gone:
				c.say("%s", err)
			case !c.silent:
				c.printf("The daemon and its apps are stopped.\n")
			}
			return nil
		}),
	}
}

func (c *cli) saveCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "save",
		Aliases: []string{"dump"},
		GroupID: groupDaemon,
		Short:   "Write the apps down for resurrect",
		Long:    "Write the apps of the list to the dump file, which resurrect reads. The daemon\nremembers by itself what shall run: this is for a state to go back to.",
		Example: `  remuda save`,
		Args:    takes(0, 0),
	}
	force := cmd.Flags().BoolP("force", "f", false, "write even an empty list")
	cmd.RunE = c.run(needDaemon, func(ctx context.Context, _ []string) error {
		saved, err := c.client.Save(ctx, *force)
		if err != nil {
			return err
		}
		if c.json {
			return c.writeJSON(saved)
		}
		if !c.silent {
			c.printf("Wrote %s to %s.\n", plural(saved.Apps, "app"), label(saved.Path))
		}
		return nil
	})
	return cmd
}

func (c *cli) resurrectCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "resurrect",
		GroupID: groupDaemon,
		Short:   "Start the apps that save wrote down",
		Example: `  remuda resurrect`,
		Args:    takes(0, 0),
		RunE: c.run(needDaemon, func(ctx context.Context, _ []string) error {
			res, err := c.busy(ctx, "resurrect", nil, func() (client.ActResult, error) { return c.client.Resurrect(ctx) })
			if err != nil {
				return err
			}
			if len(res.Instances) == 0 && !c.json && !c.silent {
				c.say("all apps of the dump file are in the list already")
			}
			return c.result(ctx, res, "")
		}),
	}
}

func (c *cli) upgradeCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "upgrade",
		Aliases: []string{"update"},
		GroupID: groupDaemon,
		Short:   "Put this version's daemon in the place of the running one",
		Long:    "Start this binary's daemon (or another's) in the place of the running one. No app\nis stopped, and no line of output or exit is missed.",
		Example: `  remuda upgrade
  remuda upgrade --binary /opt/remuda-2/remuda`,
		Args: takes(0, 0),
	}
	binary := cmd.Flags().String("binary", "", "the `path` of the new binary (default: this one)")
	cmd.RunE = c.run(needClient, func(ctx context.Context, _ []string) error {
		path := *binary
		var err error
		if path == "" {
			path, err = os.Executable()
		} else {
			path, err = c.abs(path)
		}
		if err != nil {
			return err
		}
		st, err := os.Stat(path)
		if err != nil {
			return fmt.Errorf("cannot use the new binary: %w", err)
		}
		if !st.Mode().IsRegular() || st.Mode()&0o111 == 0 {
			return fmt.Errorf("cannot use the new binary: %s is not an executable file", path)
		}
		before, err := c.client.Info(ctx)
		if err != nil {
			return err
		}
		if *binary != "" {
			if err := c.tryBinary(ctx, path); err != nil {
				return hinted{err, "The daemon was left as it is."}
			}
		}
		now, err := c.client.Upgrade(ctx, path)
		if err != nil {
			return err
		}
		for _, w := range now.Warnings {
			if strings.HasPrefix(w, "the new controller "+path) {
				return hinted{errors.New("the upgrade failed: " + w), "No app was stopped. See " + filepath.Join(c.client.Home(), "logs", "daemon.log") + "."}
			}
		}
		if c.json {
			return c.writeJSON(now)
		}
		if !c.silent {
			c.printf("The daemon is now %s (pid %d; before: %s, pid %d).\n", label(dash(now.Version)), now.PID, label(dash(before.Version)), before.PID)
		}
		return nil
	})
	return cmd
}

// tryBinary sees whether a program is Remuda and runs on this machine, before
// the daemon makes place for it.
func (c *cli) tryBinary(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, pulseLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "version", "--json", "--home", c.client.Home())
	cmd.WaitDelay = time.Second
	var answer, said limitedBuffer
	cmd.Stdout, cmd.Stderr = &answer, &said
	err := cmd.Run()
	var v struct {
		Version string
		API     int
	}
	switch {
	case ctx.Err() != nil:
		return fmt.Errorf("cannot use the new binary: `%s version` does not end", path)
	case err != nil:
		return fmt.Errorf("cannot use the new binary: `%s version` failed: %w%s", path, err, strings.TrimRight(": "+string(said.b), ": \n"))
	case json.Unmarshal(answer.b, &v) != nil || v.Version == "" || v.API == 0:
		return fmt.Errorf("cannot use the new binary: %s is not Remuda (what it says to `version --json` is something else)", path)
	}
	return nil
}

// limitedBuffer keeps the beginning of what is written to it.
type limitedBuffer struct{ b []byte }

func (l *limitedBuffer) Write(p []byte) (int, error) {
	l.b = append(l.b, p[:min(len(p), 4096-len(l.b))]...)
	return len(p), nil
}

func (c *cli) versionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "version",
		GroupID: groupMachine,
		Short:   "Print the version of this program and of the daemon",
		Example: `  remuda version
  remuda version --json`,
		Args: takes(0, 0),
		RunE: c.run(needClient, func(ctx context.Context, _ []string) error {
			ctx, cancel := context.WithTimeout(ctx, patience)
			defer cancel()
			info, err := c.client.Info(ctx)
			if c.json {
				out := map[string]any{"version": c.Version, "api": client.API, "daemon": nil}
				if err == nil {
					out["daemon"] = info
				}
				return c.writeJSON(out)
			}
			c.printf("%s\n", c.versionLine())
			switch {
			case err == nil:
				c.printf("daemon %s (pid %d, keeper %d, %s, up %s)\n", label(dash(info.Version)), info.PID, info.KeeperPID, label(info.Home), since(info.Started))
				if info.Version != c.Version {
					c.warn("the daemon is of another version: `remuda upgrade` puts this one in its place")
				}
			case errors.Is(err, client.ErrUnreachable):
				c.printf("daemon: none runs in %s\n", c.client.Home())
			case errors.Is(err, context.DeadlineExceeded):
				c.printf("daemon: it does not answer within %s; `remuda doctor` looks for trouble\n", patience)
			default:
				c.printf("daemon: %s\n", oneLine(err.Error()))
			}
			return nil
		}),
	}
}

func (c *cli) completionCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "completion bash|zsh|fish|powershell",
		GroupID: groupMachine,
		Short:   "Print the completion script of a shell",
		Long: `Print a script that teaches a shell to complete commands, flags and the names of
apps.

  bash: source <(remuda completion bash), or write it to
        /etc/bash_completion.d/remuda (bash needs the package bash-completion)
  zsh:  write it to a file named _remuda in a folder of $fpath
  fish: write it to ~/.config/fish/completions/remuda.fish`,
		Example: `  source <(remuda completion bash)
  remuda completion fish > ~/.config/fish/completions/remuda.fish`,
		Args:      takes(1, 1),
		ValidArgs: []string{"bash", "zsh", "fish", "powershell"},
		RunE: func(cmd *cobra.Command, args []string) error {
			root := cmd.Root()
			switch filepath.Base(args[0]) {
			case "bash":
				return root.GenBashCompletionV2(c.Stdout, true)
			case "zsh":
				return root.GenZshCompletion(c.Stdout)
			case "fish":
				return root.GenFishCompletion(c.Stdout, true)
			case "powershell", "pwsh":
				return root.GenPowerShellCompletionWithDesc(c.Stdout)
			}
			return usage("shells: bash, zsh, fish, powershell", "no completion for the shell %q", clip(args[0]))
		},
	}
}

// Command remuda runs, supervises and scales processes.
package main

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/cli"
	"github.com/remuda-dev/remuda/internal/daemon"
	"github.com/remuda-dev/remuda/internal/keeper"
)

// version is set by the linker at a release.
var version = "0.1.0-dev"

func main() {
	daemon.Stage(os.Args)
	os.Exit(cli.Main(context.Background(), cli.Options{
		Args: os.Args[1:], Stdin: os.Stdin, Stdout: os.Stdout, Stderr: os.Stderr,
		Version: version, Environ: os.Environ(),
		Extra: []*cobra.Command{daemonCommand(), keeperCommand(), controllerCommand()},
	}))
}

func daemonCommand() *cobra.Command {
	c := &cobra.Command{
		Use:     "daemon",
		Short:   "Run the daemon in the foreground, for systemd and containers",
		Long:    "Run the daemon in the foreground, for systemd and containers. What the state file holds is started. SIGTERM stops every app and ends the daemon; the next one starts them again.",
		Example: "  remuda daemon\n  REMUDA_HOME=/var/lib/remuda remuda daemon",
		Args:    cobra.NoArgs,
		RunE:    runKeeper,
	}
	return c
}

func keeperCommand() *cobra.Command {
	return &cobra.Command{Use: "keeper", Short: "Run the daemon's keeper process", Example: "  remuda keeper --home DIR", Hidden: true, Args: cobra.NoArgs, RunE: runKeeper}
}

func controllerCommand() *cobra.Command {
	return &cobra.Command{Use: "controller", Short: "Run the daemon's controller process", Example: "  (started by the keeper only)", Hidden: true, Args: cobra.NoArgs, RunE: runController}
}

func options(cmd *cobra.Command) (daemon.Options, error) {
	home, err := homeOf(cmd)
	if err != nil {
		return daemon.Options{}, err
	}
	binary, err := os.Executable()
	if err != nil {
		return daemon.Options{}, fmt.Errorf("cannot tell where this program is: %w", err)
	}
	return daemon.Options{Home: home, Binary: binary, Version: version, Log: slog.New(slog.NewTextHandler(os.Stderr, nil))}, nil
}

// homeOf is the folder that --home names, else the usual one.
func homeOf(cmd *cobra.Command) (string, error) {
	if f := cmd.Flag("home"); f != nil && f.Value.String() != "" {
		return filepath.Abs(f.Value.String())
	}
	return client.Home()
}

func runKeeper(cmd *cobra.Command, _ []string) error {
	o, err := options(cmd)
	if err != nil {
		return err
	}
	if err := client.MakeHome(o.Home); err != nil {
		return err
	}
	return daemon.RunKeeper(cmd.Context(), o)
}

func runController(cmd *cobra.Command, _ []string) error {
	o, err := options(cmd)
	if err != nil {
		return err
	}
	fd, err := strconv.Atoi(os.Getenv(keeper.EnvFD))
	if err != nil {
		return errors.New("the controller is started by the daemon's keeper only: use `remuda daemon`")
	}
	if err := os.Unsetenv(keeper.EnvFD); err != nil {
		return err
	}
	return daemon.RunController(cmd.Context(), o, fd)
}

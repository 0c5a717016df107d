package cli

import (
	"context"
	"errors"
	"strconv"
	"strings"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
)

// compatCommands are PM2's commands that scripts use and whose work has a
// better name here.
func (c *cli) compatCommands() []*cobra.Command {
	return []*cobra.Command{c.startOrCommand(), c.idCommand()}
}

func (c *cli) startOrCommand() *cobra.Command {
	var own startFlags
	var env string
	cmd := &cobra.Command{
		Use:     "startOrRestart FILE",
		Aliases: []string{"startOrReload", "startOrGracefulReload"},
		Hidden:  true,
		Short:   "Start or restart the apps of a process file, as start does",
		Example: `  remuda startOrRestart ecosystem.config.js --env production`,
		Args:    takes(1, 1),
	}
	cmd.Flags().StringVar(&env, "env", "", "use the env_`NAME` part of the file")
	cmd.Flags().StringVar(&own.only, "only", "", "only these `apps` of the file")
	cmd.Flags().Bool("update-env", true, "give the apps the variables of this shell (they get them anyway)")
	cmd.RunE = c.run(needDaemon, func(ctx context.Context, args []string) error {
		if !c.isFile(args[0]) {
			return hinted{errors.New(clip(args[0]) + " is not a process file that is there"), "`remuda restart TARGET` restarts apps of the list."}
		}
		own.env = []string{env}
		return c.startFile(ctx, args[0], own)
	})
	return cmd
}

func (c *cli) idCommand() *cobra.Command {
	return &cobra.Command{
		Use:               "id TARGET…",
		Hidden:            true,
		Short:             "Print the ids of apps as a JSON list",
		Example:           `  remuda id web`,
		Args:              takes(1, -1),
		ValidArgsFunction: c.completeTargets,
		RunE: c.run(needClient, func(ctx context.Context, args []string) error {
			list, err := c.client.List(ctx, args...)
			if err != nil && !errors.Is(err, client.ErrNoTarget) {
				return err
			}
			ids := make([]string, len(list))
			for k, i := range list {
				ids[k] = strconv.Itoa(i.ID)
			}
			if len(ids) == 0 {
				c.printf("[]\n")
				return nil
			}
			c.printf("[ %s ]\n", strings.Join(ids, ", "))
			return nil
		}),
	}
}

// instead is what does the work of a command of PM2 that is not here; "" for
// what is no command of PM2.
func instead(name string) string {
	switch name {
	case "monit", "imonit", "dash", "dashboard", "monitor", "unmonitor", "open":
		return "`watch remuda list` shows the table again and again, and `remuda logs` what is written."
	case "ecosystem":
		return "`remuda init` writes a process file to begin with."
	case "report", "sysinfos", "sysinfo", "slist", "profile:cpu", "profile:mem", "profile":
		return "`remuda doctor` looks over the machine, `remuda describe TARGET` over an app."
	case "updatePM2", "deepUpdate", "softupdate":
		return "`remuda upgrade` puts a new daemon in the place of the running one."
	case "gracefulReload", "softReload":
		return "`remuda reload TARGET` does it."
	case "cleardump":
		return "`remuda save --force` writes down what there is, even an empty list."
	case "set", "get", "unset", "conf", "config", "multiset", "install", "uninstall", "module:install", "module:update", "module:generate", "publish", "package":
		return "There are no settings and no modules: process files say all there is to say."
	case "attach", "serve", "deploy", "pull", "forward", "backward", "link", "unlink", "plus", "login", "register", "inspect", "autoinstall":
		return "It is PM2's and has no counterpart; `remuda --help` lists the commands."
	}
	return ""
}

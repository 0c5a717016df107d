package cli

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spf13/pflag"

	"github.com/remuda-dev/remuda/client"
)

// Groups of commands in the help.
const (
	groupApps    = "apps"
	groupFile    = "file"
	groupLook    = "look"
	groupDaemon  = "daemon"
	groupMachine = "machine"
)

// root builds the tree of commands.
func (c *cli) root() *cobra.Command {
	root := &cobra.Command{
		Use:   "remuda",
		Short: "Keep programs running",
		Long: `Remuda keeps programs in any language running, scaled, logged and reloaded.

A TARGET is a name, an id, a namespace, app:index, /a regular expression/ or all.
A process file (remuda.yaml, ecosystem.config.js, Procfile, …) stands for the
apps in it.

Exit codes: 0 done, 1 failed, 2 usage, 3 no such target, 4 no daemon, 124 timed out.`,
		Example: `  remuda start app.js -i 2 --name web   # run two instances of a program
  remuda list                           # see what runs
  remuda logs web                       # follow its output
  remuda up                             # make what runs equal remuda.yaml`,
		Version:           c.Version,
		SilenceErrors:     true,
		SilenceUsage:      true,
		Args:              cobra.ArbitraryArgs,
		CompletionOptions: cobra.CompletionOptions{DisableDefaultCmd: true},
	}
	root.RunE = func(cmd *cobra.Command, args []string) error {
		if len(args) > 0 {
			return unknownCommand(root, args[0])
		}
		return cmd.Help()
	}
	root.SetOut(c.Stdout)
	root.SetErr(c.Stderr)
	root.SetIn(c.Stdin)
	root.SetVersionTemplate(c.versionLine() + "\n")
	root.SetFlagErrorFunc(c.flagError)
	root.AddGroup(
		&cobra.Group{ID: groupApps, Title: "Run programs:"},
		&cobra.Group{ID: groupFile, Title: "Run what a file says:"},
		&cobra.Group{ID: groupLook, Title: "See what happens:"},
		&cobra.Group{ID: groupDaemon, Title: "The daemon:"},
		&cobra.Group{ID: groupMachine, Title: "This machine and this program:"},
	)
	root.SetHelpCommand(helpCommand(root))
	f := root.PersistentFlags()
	f.BoolVar(&c.json, "json", false, "print JSON for programs")
	f.BoolVar(&c.noColor, "no-color", false, "print without colours (also NO_COLOR)")
	f.StringVar(&c.home, "home", "", "the daemon's `folder` (default $REMUDA_HOME, else ~/.remuda)")
	f.DurationVar(&c.timeout, "timeout", 0, "give up after this `duration`, for example 30s (default: never)")
	f.BoolVarP(&c.silent, "silent", "s", false, "print no table and no lines of success")
	f.BoolP("mini-list", "m", false, "taken for PM2's sake")
	_ = f.MarkHidden("mini-list")

	root.AddCommand(
		c.startCommand(), c.stopCommand(), c.restartCommand(), c.reloadCommand(),
		c.deleteCommand(), c.scaleCommand(), c.resetCommand(), c.signalCommand(),
		c.sendCommand(), c.triggerCommand(),
		c.poolCommand(),
		c.upCommand(), c.downCommand(), c.initCommand(), c.schemaCommand(),
		c.listCommand(), c.jlistCommand(), c.prettylistCommand(), c.describeCommand(),
		c.envCommand(), c.pidCommand(), c.logsCommand(), c.flushCommand(),
		c.reopenCommand(), c.eventsCommand(),
		c.pingCommand(), c.killCommand(), c.saveCommand(), c.resurrectCommand(),
		c.upgradeCommand(),

		c.startupCommand(), c.unstartupCommand(), c.doctorCommand(),
		c.completionCommand(), c.versionCommand(),
	)
	root.AddCommand(c.compatCommands()...)
	for _, x := range c.Extra {
		if x.GroupID == "" && !x.Hidden {
			x.GroupID = groupDaemon
		}
		root.AddCommand(x)
	}
	return root
}

// helpCommand is cobra's, but for a command that is not there.
func helpCommand(root *cobra.Command) *cobra.Command {
	return &cobra.Command{
		Use:     "help [COMMAND]",
		GroupID: groupMachine,
		Short:   "Help about any command",
		ValidArgsFunction: func(_ *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
			var names []string
			if at, _, err := root.Find(args); err == nil {
				for _, sub := range at.Commands() {
					if sub.IsAvailableCommand() && strings.HasPrefix(sub.Name(), prefix) {
						names = append(names, sub.Name()+"\t"+sub.Short)
					}
				}
			}
			return names, cobra.ShellCompDirectiveNoFileComp
		},
		RunE: func(_ *cobra.Command, args []string) error {
			of, _, err := root.Find(args)
			if err != nil || of == root && len(args) > 0 {
				return unknownCommand(root, args[0])
			}
			of.InitDefaultHelpFlag()
			return of.Help()
		},
	}
}

func (c *cli) versionLine() string {
	return fmt.Sprintf("remuda %s (%s, %s/%s)", dash(c.Version), runtime.Version(), runtime.GOOS, runtime.GOARCH)
}

func unknownCommand(root *cobra.Command, name string) error {
	text := fmt.Sprintf("unknown command %q", clip(name))
	if s := instead(name); s != "" {
		return &usageError{text: text, hint: s}
	}
	hint := "`remuda --help` lists the commands."
	var names []string
	for _, sub := range root.Commands() {
		if sub.IsAvailableCommand() {
			names = append(append(names, sub.Name()), sub.Aliases...)
		}
	}
	if s := nearest(name, names); s != "" {
		hint = fmt.Sprintf("did you mean `remuda %s`? %s", s, hint)
	}
	return &usageError{text: text, hint: hint}
}

// clip shortens what a person typed, for messages.
func clip(s string) string {
	if len(s) > 80 {
		return strings.ToValidUTF8(s[:80], "") + "…"
	}
	return s
}

// flagError turns what the flag parser says into words, with the flag that may
// have been meant.
func (c *cli) flagError(cmd *cobra.Command, err error) error {
	if !cmd.HasParent() {
		// `remuda starrt app.js -n web`: the command is what is wrong.
		if rest := firstWord(c.Args); rest != "" {
			if sub, _, err := cmd.Find([]string{rest}); err != nil || sub == cmd {
				return unknownCommand(cmd, rest)
			}
		}
	}
	hint := fmt.Sprintf("`%s --help` lists the flags.", cmd.CommandPath())
	var unknown *pflag.NotExistError
	if errors.As(err, &unknown) {
		if unknown.GetSpecifiedShortnames() != "" {
			return usage(hint, "unknown flag -%s of `%s`", clip(unknown.GetSpecifiedName()), cmd.CommandPath())
		}
		var names []string
		see := func(f *pflag.Flag) {
			if !f.Hidden {
				names = append(names, f.Name)
			}
		}
		cmd.Flags().VisitAll(see)
		cmd.InheritedFlags().VisitAll(see)
		name := unknown.GetSpecifiedName()
		if start, _, err := cmd.Root().Find([]string{"start"}); err == nil && start.Flags().Lookup(name) != nil {
			hint = fmt.Sprintf("--%s is a flag of `remuda start`. %s", name, hint)
		} else if s := nearest(name, names); s != "" {
			hint = fmt.Sprintf("did you mean --%s? %s", s, hint)
		}
		return usage(hint, "unknown flag --%s of `%s`", clip(name), cmd.CommandPath())
	}
	return usage(hint, "%s", strings.ReplaceAll(err.Error(), "strconv.ParseInt: ", ""))
}

// firstWord is the first argument that is neither a flag nor the value of a
// global one.
func firstWord(args []string) string {
	if w := firstWords(args); len(w) > 0 {
		return w[0]
	}
	return ""
}

// firstWords are the first two of the kind.
func firstWords(args []string) (words []string) {
	for k := 0; k < len(args); k++ {
		switch a := args[k]; {
		case a == "--home" || a == "--timeout":
			k++
		case a == "--" || len(words) == 2:
			return words
		case !strings.HasPrefix(a, "-"):
			words = append(words, a)
		}
	}
	return words
}

// protectNegative lets `scale web -1` be a number rather than a flag.
func protectNegative(args []string) []string {
	if w := firstWords(args); len(w) == 0 || w[0] != "scale" && (len(w) < 2 || w[0] != "pool" || w[1] != "scale") || slices.Contains(args, "--") {
		return args
	}
	for k, a := range args {
		if len(a) > 1 && a[0] == '-' {
			if _, err := strconv.Atoi(a); err == nil && (k == 0 || args[k-1] != "--timeout") {
				return append(append(slices.Clone(args[:k]), args[k+1:]...), "--", a)
			}
		}
	}
	return args
}

// takes checks the number of arguments; most < 0 is any number.
func takes(least, most int) cobra.PositionalArgs {
	return func(cmd *cobra.Command, args []string) error {
		hint := fmt.Sprintf("usage: remuda %s", cmd.Use)
		switch {
		case len(args) < least:
			return usage(hint, "`%s` needs %s", cmd.CommandPath(), arguments(least))
		case most == 0 && len(args) > 0:
			return usage(hint, "`%s` takes no argument, but got %q", cmd.CommandPath(), clip(args[0]))
		case most > 0 && len(args) > most:
			return usage(hint, "`%s` takes at most %s, but got one more: %q", cmd.CommandPath(), arguments(most), clip(args[most]))
		}
		for _, a := range args {
			if a == "" {
				return usage(hint, "`%s` got an empty argument", cmd.CommandPath())
			}
		}
		return nil
	}
}

func arguments(n int) string {
	if n == 1 {
		return "an argument"
	}
	return fmt.Sprintf("%d arguments", n)
}

// completeTargets offers the names and ids of what runs.
func (c *cli) completeTargets(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return c.complete(cmd, prefix, true), cobra.ShellCompDirectiveNoFileComp
}

// completeOneTarget is [cli.completeTargets] for commands with one target.
func (c *cli) completeOneTarget(cmd *cobra.Command, args []string, prefix string) ([]string, cobra.ShellCompDirective) {
	if len(args) > 0 {
		return nil, cobra.ShellCompDirectiveNoFileComp
	}
	return c.complete(cmd, prefix, true), cobra.ShellCompDirectiveNoFileComp
}

// completeTargetsAndFiles leaves file names to the shell as well.
func (c *cli) completeTargetsAndFiles(cmd *cobra.Command, _ []string, prefix string) ([]string, cobra.ShellCompDirective) {
	return c.complete(cmd, prefix, true), cobra.ShellCompDirectiveDefault
}

// completionLimit is how long pressing tab may take.
const completionLimit = 500 * time.Millisecond

func (c *cli) complete(cmd *cobra.Command, prefix string, ids bool) []string {
	if c.dial() != nil {
		return nil
	}
	ctx, cancel := context.WithTimeout(cmd.Context(), completionLimit)
	defer cancel()
	list, err := c.client.List(ctx)
	if err != nil {
		return nil
	}
	out := targetNames(list, prefix, ids)
	if pools, err := c.client.Pools(ctx); err == nil {
		for k := range pools {
			if n := pools[k].Name; strings.HasPrefix(n, prefix) && !strings.ContainsAny(n, "\t\n") {
				out = append(out, n+"\tpool")
			}
		}
	}
	return out
}

func targetNames(list []client.Instance, prefix string, ids bool) []string {
	var out []string
	seen := map[string]bool{}
	add := func(s, what string) {
		if s == "" || seen[s] || !strings.HasPrefix(s, prefix) || strings.ContainsAny(s, "\t\n") {
			return
		}
		seen[s] = true
		out = append(out, s+"\t"+what)
	}
	for _, i := range list {
		add(i.App, "app")
	}
	for _, i := range list {
		if i.Namespace != "default" {
			add(i.Namespace, "namespace")
		}
	}
	if ids && prefix != "" {
		for _, i := range list {
			add(strconv.Itoa(i.ID), instanceName(i))
		}
	}
	if len(list) > 0 {
		add("all", "every app")
	}
	return out
}

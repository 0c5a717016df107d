package cli

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
	"github.com/remuda-dev/remuda/internal/config"
)

// source is the absolute path of the process file that up and down are about:
// the one named, or the one in the working directory.
func (c *cli) source(file string) (string, error) {
	if file != "" {
		return c.abs(file)
	}
	dir, err := c.cwd()
	if err != nil {
		return "", err
	}
	path, err := config.Find(dir)
	if err != nil {
		return "", err
	}
	return c.abs(path)
}

// fileFlag is the -f of up and down, which may be given as an argument too.
func fileFlag(cmd *cobra.Command) func(args []string) (string, error) {
	file := cmd.Flags().StringP("file", "f", "", "the process `file` (default: the one in this folder)")
	return func(args []string) (string, error) {
		if len(args) > 0 && *file != "" {
			return "", usage("usage: remuda "+cmd.Use, "the file is named twice: %q and %q", clip(*file), clip(args[0]))
		}
		if len(args) > 0 {
			return args[0], nil
		}
		return *file, nil
	}
}

func (c *cli) upCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "up [-f FILE]",
		GroupID: groupFile,
		Short:   "Make what runs equal the process file",
		Long: `Show the difference between what the process file says and what runs of it,
then apply it: new apps are started, changed ones brought to what the file says,
those that the file no longer names stopped and deleted. Nothing that is unchanged
is restarted, and apps that did not come from this file are left alone.`,
		Example: `  remuda up
  remuda up --dry-run
  remuda up -f deploy/remuda.yaml --env production`,
		Args: takes(0, 1),
	}
	file := fileFlag(cmd)
	dry := cmd.Flags().Bool("dry-run", false, "show the difference and change nothing")
	env := cmd.Flags().String("env", "", "use the env_`NAME` part of the file")
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		name, err := file(args)
		if err != nil {
			return err
		}
		path, err := c.source(name)
		if err != nil {
			return err
		}
		f, err := c.load(ctx, path, startFlags{env: []string{*env}})
		if err != nil {
			return err
		}
		return c.up(ctx, client.UpRequest{Source: path, Apps: f.Apps, Pools: f.Pools, Groups: f.Groups}, *dry)
	})
	return cmd
}

func (c *cli) up(ctx context.Context, req client.UpRequest, dry bool) error {
	if !dry {
		if err := c.launch(ctx); err != nil {
			return err
		}
	}
	if dry || !c.json {
		look := req
		look.DryRun = true
		res, err := c.client.Up(ctx, look)
		if dry && errors.Is(err, client.ErrUnreachable) && !errors.Is(err, os.ErrPermission) {
			// A look must not launch a daemon: without one, everything is new.
			c.say("%s", err)
			res, err = client.ActResult{}, nil
			for _, app := range req.Apps {
				res.Changes = append(res.Changes, client.Change{App: app.Name, Action: "add"})
			}
			for k := range req.Pools {
				res.Changes = append(res.Changes, client.Change{App: req.Pools[k].Name, Pool: true, Action: "add"})
			}
		}
		if err != nil {
			return err
		}
		if c.json {
			res.Instances = notNil(res.Instances)
			return c.writeJSON(res)
		}
		if dry || !c.silent {
			c.printf("%s", difference(res.Changes, req, c.paint(c.Stdout)))
		}
		if dry {
			for _, w := range res.Warnings {
				c.warn(w)
			}
			return nil
		}
	}
	res, err := c.busy(ctx, "up", appNames(req.Apps), func() (client.ActResult, error) { return c.client.Up(ctx, req) })
	if err != nil {
		return err
	}
	return c.result(ctx, res, "")
}

// difference is what up is about to do, in lines.
func difference(changes []client.Change, req client.UpRequest, p paint) string {
	var b strings.Builder
	same := 0
	for _, ch := range changes {
		name := label(ch.App)
		if ch.Pool {
			name = "pool " + name
		}
		switch ch.Action {
		case "add":
			n, most, what := 1, 0, "instance"
			for k := range req.Apps {
				if req.Apps[k].Name == ch.App {
					n = req.Apps[k].Instances
				}
			}
			for k := range req.Pools {
				if req.Pools[k].Name == ch.App {
					n, most, what = req.Pools[k].Min, req.Pools[k].Max, "worker"
				}
			}
			many := plural(n, what)
			if most > n {
				many = fmt.Sprintf("%d to %s", n, plural(most, what))
			}
			fmt.Fprintln(&b, p.sgr("32", fmt.Sprintf("+ add %s (%s)", name, many)))
		case "remove":
			fmt.Fprintln(&b, p.sgr("31", "- remove "+name))
		case "none":
			same++
		default:
			line := fmt.Sprintf("~ %s %s", label(ch.Action), name)
			if len(ch.Fields) > 0 {
				line += ": " + oneLine(strings.Join(ch.Fields, "; "))
			}
			fmt.Fprintln(&b, p.sgr("33", line))
		}
	}
	if same > 0 || len(changes) == 0 {
		fmt.Fprintln(&b, p.dim(fmt.Sprintf("= %d unchanged", same)))
	}
	return b.String()
}

func (c *cli) downCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "down [-f FILE]",
		GroupID: groupFile,
		Short:   "Stop and delete the apps of the process file",
		Long: `Stop and delete every app that came from the process file by up. The file itself
need not be there any more.`,
		Example: `  remuda down
  remuda down -f deploy/remuda.yaml`,
		Args: takes(0, 1),
	}
	file := fileFlag(cmd)
	cmd.RunE = c.run(needClient, func(ctx context.Context, args []string) error {
		name, err := file(args)
		if err != nil {
			return err
		}
		path, err := c.source(name)
		if err != nil {
			return err
		}
		if err := c.launch(ctx); err != nil {
			return err
		}
		res, err := c.busy(ctx, "down", nil, func() (client.ActResult, error) { return c.client.Down(ctx, path) })
		if err != nil {
			return err
		}
		if len(res.Instances)+len(res.Pools) == 0 && !c.json {
			c.say("nothing runs of %s", path)
		}
		return c.result(ctx, res, "deleted")
	})
	return cmd
}

// sample is what init writes.
const sample = `# What Remuda is to run. "remuda up" makes what runs equal this file, and
# "remuda schema" prints all the keys there are.
apps:
  web:
    # What to run: a program and its arguments.
    run: node server.js
    # cwd: server             # the folder it runs in; default: that of this file
    # instances: 2            # a number, or max
    # env:
    #   PORT: "8080"
    # restart:
    #   policy: always        # always | on-failure | never
    #   max_restarts: 16
    #   max_memory: 300M
    # stop:
    #   signal: SIGTERM
    #   grace: 5s
    # watch: src
    # depends_on: db          # started when db is ready
`

func (c *cli) initCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "init [FILE]",
		GroupID: groupFile,
		Short:   "Write a remuda.yaml to begin with",
		Example: `  remuda init
  remuda init deploy/remuda.yaml`,
		Args: takes(0, 1),
	}
	force := cmd.Flags().BoolP("force", "f", false, "overwrite a file that is there")
	cmd.RunE = c.run(needNothing, func(_ context.Context, args []string) error {
		name := "remuda.yaml"
		if len(args) > 0 {
			name = args[0]
		}
		path, err := c.abs(name)
		if err != nil {
			return err
		}
		flags := os.O_WRONLY | os.O_CREATE | os.O_EXCL
		if *force {
			flags = os.O_WRONLY | os.O_CREATE | os.O_TRUNC
		}
		f, err := os.OpenFile(path, flags, 0o644)
		if errors.Is(err, fs.ErrExist) {
			return hinted{fmt.Errorf("%s is there already", path), "--force overwrites it."}
		}
		if err != nil {
			return fmt.Errorf("cannot write the file: %w", err)
		}
		_, err = f.WriteString(sample)
		if err := errors.Join(err, f.Close()); err != nil {
			return fmt.Errorf("cannot write the file: %w", err)
		}
		if c.json {
			return c.writeJSON(map[string]string{"path": path})
		}
		c.printf("Wrote %s. Edit it, then `remuda up`.\n", filepath.Base(path))
		return nil
	})
	return cmd
}

func (c *cli) schemaCommand() *cobra.Command {
	return &cobra.Command{
		Use:     "schema",
		GroupID: groupFile,
		Short:   "Print the JSON Schema of remuda.yaml",
		Example: `  remuda schema > remuda.schema.json`,
		Args:    takes(0, 0),
		RunE: c.run(needNothing, func(context.Context, []string) error {
			b, err := config.Schema()
			if err != nil {
				return err
			}
			_, err = c.Stdout.Write(append(b, '\n'))
			return err
		}),
	}
}

package cli

import (
	"context"
	"encoding/json"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/remuda-dev/remuda/client"
)

// maxReplyWait is how long the daemon waits for a reply at most.
const maxReplyWait = 10 * time.Minute

func (c *cli) sendCommand() *cobra.Command {
	var text bool
	cmd := &cobra.Command{
		Use:     "send TARGET MESSAGE",
		GroupID: groupApps,
		Short:   "Send a message to Node programs",
		Long: `Send a message to Node programs, which get it by process.on('message', …).

A message that is JSON is sent as what it stands for, any other as a string.
(PM2's send writes to standard input, which is empty for programs of Remuda.)`,
		Example: `  remuda send web '{"type": "log_level", "level": "debug"}'
  remuda send web reload-certificates
  remuda send all --text 42`,
		Args:              takes(2, 2),
		ValidArgsFunction: c.completeOneTarget,
		RunE: c.run(needDaemon, func(ctx context.Context, args []string) error {
			res, err := c.client.Message(ctx, client.MessageRequest{Targets: args[:1], Message: jsonOrText(args[1], text)})
			if err != nil {
				return err
			}
			return c.told(res)
		}),
	}
	cmd.Flags().BoolVar(&text, "text", false, "send it as a string, even if it is JSON")
	return cmd
}

func (c *cli) triggerCommand() *cobra.Command {
	var wait time.Duration
	cmd := &cobra.Command{
		Use:     "trigger TARGET ACTION [PARAMS]",
		GroupID: groupApps,
		Short:   "Trigger an action of Node programs that use @pm2/io",
		Long: `Trigger a custom action of Node programs that use @pm2/io (or pmx), and print what
they reply, each as JSON.

Without PARAMS the program gets the message "ACTION", with them
{"msg": "ACTION", "opts": PARAMS}. It replies by
{"type": "axm:reply", "data": {"action_name": "ACTION", "return": …}}.
PARAMS that are JSON are sent as what they stand for, any other as a string.`,
		Example: `  remuda trigger web clear-cache
  remuda trigger web log-level '{"level": "debug"}' --wait 30s
  remuda trigger all report --json`,
		Args:              takes(2, 3),
		ValidArgsFunction: c.completeOneTarget,
		RunE: c.run(needDaemon, func(ctx context.Context, args []string) error {
			if wait < time.Millisecond || wait > maxReplyWait {
				return usage("give a duration such as 30s.", "--wait is to be from 1ms to %s, not %s", maxReplyWait, wait)
			}
			var message any = args[1]
			if len(args) == 3 {
				message = struct {
					Msg  string          `json:"msg"`
					Opts json.RawMessage `json:"opts"`
				}{args[1], jsonOrText(args[2], false)}
			}
			raw, err := json.Marshal(message)
			if err != nil {
				return err
			}
			res, err := c.client.Message(ctx, client.MessageRequest{Targets: args[:1], Message: raw, Reply: args[1], WaitMS: int(wait.Milliseconds())})
			if err != nil {
				return err
			}
			return c.told(res)
		}),
	}
	cmd.Flags().DurationVar(&wait, "wait", 5*time.Second, "wait for replies this `duration`, at most 10m")
	return cmd
}

// jsonOrText is s itself where it is JSON, else, or with text, a string of it.
func jsonOrText(s string, text bool) json.RawMessage {
	if !text && json.Valid([]byte(s)) {
		return json.RawMessage(s)
	}
	b, err := json.Marshal(s)
	if err != nil { // a string always can be
		panic(err)
	}
	return b
}

// told says what came of a message, without the table: nothing has changed.
func (c *cli) told(res client.ActResult) error {
	failed := false
	for i := range res.Instances {
		failed = failed || res.Instances[i].Error != ""
	}
	if c.json {
		res.Instances = notNil(res.Instances)
		if err := c.writeJSON(res); err != nil {
			return err
		}
	} else {
		bad := c.paint(c.Stderr)
		for i := range res.Instances {
			o := &res.Instances[i]
			switch {
			case o.Error != "":
				fmt.Fprintln(c.Stderr, bad.red(fmt.Sprintf("[%s] %s", instanceName(o.Instance), oneLine(o.Error))))
			case o.Reply != nil:
				c.printf("[%s] %s\n", instanceName(o.Instance), label(string(o.Reply)))
			case !c.silent:
				c.printf("[%s] message sent\n", instanceName(o.Instance))
			}
		}
	}
	if failed {
		return errFailed
	}
	return nil
}

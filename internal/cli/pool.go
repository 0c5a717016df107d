package cli

import "github.com/spf13/cobra"

func (c *cli) poolCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "pool",
		GroupID: groupApps,
		Short:   "Spread tasks over worker processes",
		Long: `Spread tasks over worker processes. Pools that the daemon keeps are written under
pools: in remuda.yaml and made by ` + "`remuda up`" + `; run needs no daemon.`,
		Example: `  remuda pool ls
  remuda pool do thumbs '{"file": "a.png"}'
  remuda pool run -n 4 --protocol jsonl -- jq -c --unbuffered .name < tasks.jsonl`,
		Args: takes(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.poolRunCommand())
	cmd.AddCommand(c.poolCommands()...)
	return cmd
}

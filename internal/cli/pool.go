package cli

import "github.com/spf13/cobra"

func (c *cli) poolCommand() *cobra.Command {
	cmd := &cobra.Command{
		Use:     "pool",
		GroupID: groupApps,
		Short:   "Spread tasks over worker processes",
		Example: `  remuda pool run -n 4 --protocol jsonl -- jq -c --unbuffered .name < tasks.jsonl`,
		Args:    takes(0, 0),
		RunE:    func(cmd *cobra.Command, _ []string) error { return cmd.Help() },
	}
	cmd.AddCommand(c.poolRunCommand())
	return cmd
}

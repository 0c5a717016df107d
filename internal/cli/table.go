package cli

import (
	"strconv"
	"strings"
	"time"

	"github.com/remuda-dev/remuda/client"
)

// column is one column of the table of instances.
type column struct {
	title string
	right bool // numbers
	rank  int  // the higher, the sooner it is left out
	soft  int  // width that it is cut to before columns are left out, 0: never cut
	hard  int  // width that it is cut to when all else has been done
	cell  func(i *client.Instance, now time.Time) string
}

// tableColumns are the columns, from left to right.
func tableColumns() []column {
	return []column{
		{title: "id", right: true, cell: func(i *client.Instance, _ time.Time) string { return strconv.Itoa(i.ID) }},
		{title: "name", soft: 32, hard: 12, cell: func(i *client.Instance, _ time.Time) string { return label(i.App) }},
		{title: "namespace", rank: 7, soft: 16, hard: 12, cell: func(i *client.Instance, _ time.Time) string { return label(i.Namespace) }},
		{title: "version", rank: 11, soft: 12, hard: 8, cell: func(i *client.Instance, _ time.Time) string { return dash(label(i.Version)) }},
		{title: "mode", rank: 8, cell: func(i *client.Instance, _ time.Time) string { return dash(label(i.ExecMode)) }},
		{title: "pid", right: true, rank: 5, cell: func(i *client.Instance, _ time.Time) string {
			if i.PID == 0 {
				return "-"
			}
			return strconv.Itoa(i.PID)
		}},
		{title: "uptime", right: true, rank: 4, cell: uptime},
		{title: "↺", right: true, rank: 3, cell: func(i *client.Instance, _ time.Time) string { return strconv.Itoa(i.Restarts) }},
		{title: "status", cell: func(i *client.Instance, _ time.Time) string { return label(string(i.State)) }},
		{title: "cpu", right: true, rank: 2, cell: func(i *client.Instance, _ time.Time) string {
			return strconv.FormatFloat(i.CPU, 'f', 1, 64) + "%"
		}},
		{title: "mem", right: true, rank: 1, cell: func(i *client.Instance, _ time.Time) string { return size(i.Memory) }},
		{title: "user", rank: 9, soft: 12, hard: 8, cell: func(i *client.Instance, _ time.Time) string { return dash(label(i.User)) }},
		{title: "watching", rank: 10, cell: func(i *client.Instance, _ time.Time) string { return yesno(i.Watching) }},
	}
}

func dash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

// uptime is how long the present run lasts, "-" where nothing runs.
func uptime(i *client.Instance, now time.Time) string {
	if i.PID == 0 || i.Since.IsZero() {
		return "-"
	}
	return span(now.Sub(i.Since))
}

const gap = "  "

// layout is a table that has been given its widths.
type layout struct {
	columns []column
	widths  []int
	cells   [][]string // by column, then row
}

// arrange makes the table fit into limit columns (0: any width): first long
// names are cut to a comfortable width, then the least important columns are
// left out, at last names are cut to what there is room for.
func arrange(list []client.Instance, limit int, now time.Time) layout {
	l := layout{columns: tableColumns()}
	for _, col := range l.columns {
		cells := make([]string, len(list))
		w := width(col.title)
		for r := range list {
			cells[r] = col.cell(&list[r], now)
			w = max(w, width(cells[r]))
		}
		l.cells = append(l.cells, cells)
		l.widths = append(l.widths, w)
	}
	if limit <= 0 {
		return l
	}
	for k, col := range l.columns {
		if over := l.total() - limit; over > 0 && col.soft > 0 && l.widths[k] > col.soft {
			l.widths[k] = max(col.soft, l.widths[k]-over)
		}
	}
	for l.total() > limit {
		worst := 0
		for k, col := range l.columns {
			if col.rank > l.columns[worst].rank {
				worst = k
			}
		}
		// Names that are cut a little are better than a column lost.
		if over := l.total() - limit; l.columns[worst].rank <= 7 && over <= l.widths[1]-l.columns[1].hard {
			l.widths[1] -= over
			return l
		}
		if l.columns[worst].rank == 0 {
			break
		}
		l.columns = append(l.columns[:worst:worst], l.columns[worst+1:]...)
		l.widths = append(l.widths[:worst:worst], l.widths[worst+1:]...)
		l.cells = append(l.cells[:worst:worst], l.cells[worst+1:]...)
	}
	if over := l.total() - limit; over > 0 {
		l.widths[1] = max(1, l.widths[1]-over)
	}
	return l
}

func (l layout) total() int {
	n := len(gap) * (len(l.widths) - 1)
	for _, w := range l.widths {
		n += w
	}
	return n
}

// render is the table as text, one line for the titles and one per row.
func (l layout) render(list []client.Instance, p paint) string {
	var b strings.Builder
	b.Grow((l.total() + 16) * (len(list) + 1))
	line := func(row int) {
		for k, col := range l.columns {
			s := col.title
			if row >= 0 {
				s = l.cells[k][row]
			}
			s = fit(s, l.widths[k])
			pad := l.widths[k] - width(s)
			if k > 0 {
				b.WriteString(gap)
			}
			if col.right {
				writeSpaces(&b, pad)
			}
			switch {
			case row < 0:
				b.WriteString(p.bold(s))
			case col.title == "status":
				b.WriteString(p.state(list[row].State, s))
			default:
				b.WriteString(s)
			}
			if !col.right && k < len(l.columns)-1 {
				writeSpaces(&b, pad)
			}
		}
		b.WriteByte('\n')
	}
	line(-1)
	for r := range list {
		line(r)
	}
	return b.String()
}

func writeSpaces(b *strings.Builder, n int) {
	for ; n > 0; n-- {
		b.WriteByte(' ')
	}
}

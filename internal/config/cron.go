package config

import (
	"errors"
	"fmt"
	"time"

	"github.com/netresearch/go-cron"
)

// Schedule says when a cron restart is next due after t; the zero time means
// never again.
type Schedule interface{ Next(t time.Time) time.Time }

// ParseCron reads the schedule of [Restart].Cron: 5 fields, 6 with seconds in
// front, @hourly and the like, @every 1h, each with TZ=Zone in front where it
// is not to be the machine's time.
func ParseCron(spec string) (s Schedule, err error) {
	defer func() {
		if recover() != nil {
			s, err = nil, fmt.Errorf("%s is no cron schedule", clip(spec))
		}
	}()
	if len(spec) > 1024 {
		return nil, errors.New("the cron schedule is longer than 1024 bytes")
	}
	p, err := cron.TryNewParser(cron.SecondOptional | cron.Minute | cron.Hour | cron.Dom | cron.Month | cron.Dow | cron.Descriptor)
	if err != nil {
		return nil, fmt.Errorf("cron: %w", err)
	}
	sched, err := p.Parse(spec)
	if err != nil {
		return nil, fmt.Errorf("%s is no cron schedule (%s): write minute hour day month weekday, such as \"0 3 * * *\"", clip(spec), oneLine(err.Error()))
	}
	return sched, nil
}

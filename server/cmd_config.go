package server

import (
	"fmt"
	"slices"
	"strings"
)

// findSetting returns the row of a name in any case, or nil.
func findSetting(name string) *setting {
	for i := range settings {
		if strings.EqualFold(settings[i].name, name) {
			return &settings[i]
		}
	}
	return nil
}

func configGet(s *Server, c *client, args [][]byte) {
	var names []string
	var found []*setting
	add := func(name string, st *setting) {
		if !slices.Contains(found, st) {
			names, found = append(names, name), append(found, st)
		}
	}
	for _, a := range args[2:] {
		name := string(a)
		if st := findSetting(name); st != nil {
			add(name, st) // Redis answers with the name as it was asked for
			continue
		}
		pattern := strings.ToLower(name)
		for i := range settings {
			if glob(pattern, settings[i].name) {
				add(settings[i].name, &settings[i])
			}
		}
	}
	c.dict(len(found))
	for i, st := range found {
		value := st.get(&s.cfg)
		if st.name == "bind" {
			value = s.addr.Addr().String()
		}
		c.text(names[i])
		c.text(value)
	}
}

func configSet(s *Server, c *client, args [][]byte) {
	if len(args)%2 != 0 {
		s.error(c, errSyntax)
		return
	}
	changed := s.cfg
	seen := map[*setting]bool{}
	for i := 2; i < len(args); i += 2 {
		name, value := string(args[i]), string(args[i+1])
		st := findSetting(name)
		shown := excerpt(args[i])
		failed := "ERR CONFIG SET failed (possibly related to argument '" + shown + "') - "
		switch {
		case st == nil:
			s.error(c, "ERR Unknown option or number of arguments for CONFIG SET - '"+shown+"'")
			return
		case seen[st]:
			s.error(c, failed+"duplicate parameter")
			return
		case st.startOnly || st.set == nil && value != st.get(&changed):
			s.error(c, failed+"can't set immutable config")
			return
		}
		seen[st] = true
		if st.set == nil {
			continue
		}
		if err := st.set(&changed, value); err != nil {
			s.error(c, failed+err.Error())
			return
		}
	}
	if changed.MaxClients != s.cfg.MaxClients {
		if most, err := clientsAllowed(); err == nil && changed.MaxClients > most {
			s.error(c, fmt.Sprintf("ERR CONFIG SET failed (possibly related to argument 'maxclients') - The operating system is not able to handle the specified number of clients, try with %d", most))
			return
		}
	}
	if changed.KeepAlive != s.cfg.KeepAlive {
		if err := setKeepAlive(s.listenFD, changed.KeepAlive); err != nil {
			s.error(c, "ERR CONFIG SET failed (possibly related to argument 'tcp-keepalive') - "+err.Error())
			return
		}
	}
	s.cfg = changed
	s.configChanged()
	c.ok()
}

func configResetStat(s *Server, c *client, _ [][]byte) {
	s.stats = stats{cycles: s.stats.cycles, opsSampledAt: s.clock.now}
	c.ok()
}

// Package diagnose tells which connection incident the kernel's counters of a
// host fit. It reads what people save on their own servers (nstat, netstat -s,
// files of /proc/net, sysctl, ss -lnt), compares it with a table of signatures,
// and says what speaks for and against each incident.
//
// An incident has necessary observations. It fits if all of them hold, it is
// excluded if one of them does not, and it is possible while one of them cannot
// be told. There is no score. A counter that is not in the input is missing, not
// zero, except where a program is known to leave zeros out (see [Parse]).
//
// What it refuses to do: it does not guess at a cause outside its table, does
// not turn counters since boot into rates, and does not choose between two
// incidents that the counters cannot tell apart; then it says which one
// observation would decide. Counters count attempts, not victims: a SYN that is
// sent again and dropped again counts twice.
//
// It rests on the SNMP counters of net/ipv4/proc.c (snmp4_net_list,
// snmp4_tcp_list), on sockstat_seq_show in the same file, and, for netstat -s, on
// the sentences of net-tools' statistics.c. Each observation names the kernel
// function that counts.
package diagnose

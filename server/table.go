package server

// The groups of COMMAND DOCS.
const (
	groupGeneric    = "generic"
	groupString     = "string"
	groupConnection = "connection"
	groupServer     = "server"
	groupConnlab    = "connlab"
)

// Where the keys of a command are.
var (
	oneKey  = keySpec{1, 1, 1}
	allKeys = keySpec{1, -1, 1}
	pairs   = keySpec{1, -1, 2}
)

// commandTable returns every command. It is a function because the commands about commands need the table.
func commandTable() []command {
	return []command{
		{name: "auth", arity: -2, flags: flagFast | flagNoAuth | flagSecret, group: groupConnection, since: "1.0.0", summary: "Authenticates the connection.", run: auth},
		{name: "client", arity: -2, group: groupConnection, since: "2.4.0", summary: "A container for client connection commands.", subs: clientTable()},
		{name: "command", arity: -1, group: groupServer, since: "2.8.13", summary: "Returns detailed information about all commands.", run: commandAll, subs: []command{
			{name: "count", arity: 2, since: "2.8.13", summary: "Return the number of commands.", run: commandCount},
			{name: "docs", arity: -2, since: "7.0.0", usage: "[<command-name> ...]", summary: "Return documentation of the given commands, or of all.", run: commandDocs},
			{name: "info", arity: -2, since: "2.8.13", usage: "[<command-name> ...]", summary: "Return details of the given commands, or of all.", run: commandInfo},
			{name: "list", arity: -2, since: "7.0.0", usage: "[FILTERBY PATTERN <pattern>]", summary: "Return the names of the commands.", run: commandList},
		}},
		{name: "config", arity: -2, group: groupServer, since: "2.0.0", summary: "A container for server configuration commands.", subs: []command{
			{name: "get", arity: -3, flags: flagAdmin, since: "2.0.0", usage: "<pattern> [<pattern> ...]", summary: "Return the settings whose names match.", run: configGet},
			{name: "set", arity: -4, flags: flagAdmin | flagSecret | flagEveryWorker, since: "2.0.0", usage: "<name> <value> [<name> <value> ...]", summary: "Change settings, all of them or none.", run: configSet},
			{name: "resetstat", arity: 2, flags: flagAdmin | flagEveryWorker, since: "2.0.0", summary: "Set the counters of INFO to zero.", run: configResetStat},
		}},
		{name: "connlab", arity: -2, group: groupConnlab, since: "1.0.0", summary: "A container for the injection of faults.", subs: connlabTable()},
		{name: "dbsize", arity: 1, flags: flagReadonly | flagFast, group: groupServer, since: "1.0.0", summary: "Returns the number of keys in the database.", run: dbsize},
		{name: "debug", arity: -2, group: groupServer, since: "1.0.0", summary: "A container for debugging commands.", subs: []command{
			{name: "sleep", arity: 3, flags: flagAdmin, since: "1.0.0", usage: "<seconds>", summary: "Stop the server for <seconds>, decimals allowed.", run: debugSleep},
		}},
		{name: "del", arity: -2, flags: flagWrite, keys: allKeys, group: groupGeneric, since: "1.0.0", summary: "Deletes one or more keys.", run: del},
		{name: "echo", arity: 2, flags: flagFast, group: groupConnection, since: "1.0.0", summary: "Returns the given string.", run: echo},
		{name: "exists", arity: -2, flags: flagReadonly | flagFast, keys: allKeys, group: groupGeneric, since: "1.0.0", summary: "Determines how many of the keys exist.", run: exists},
		{name: "expire", arity: -3, flags: flagWrite | flagFast, keys: oneKey, group: groupGeneric, since: "1.0.0", summary: "Sets the expiration time of a key in seconds.", run: expire},
		{name: "flushall", arity: -1, flags: flagWrite, group: groupServer, since: "1.0.0", summary: "Removes all keys from all databases.", run: flushall},
		{name: "get", arity: 2, flags: flagReadonly | flagFast, keys: oneKey, group: groupString, since: "1.0.0", summary: "Returns the string value of a key.", run: get},
		{name: "hello", arity: -1, flags: flagFast | flagNoAuth | flagSecret, group: groupConnection, since: "6.0.0", summary: "Handshakes with the server.", run: hello},
		{name: "incr", arity: 2, flags: flagWrite | flagDenyOOM | flagFast, keys: oneKey, group: groupString, since: "1.0.0", summary: "Increments the integer value of a key by one.", run: incr},
		{name: "info", arity: -1, group: groupServer, since: "1.0.0", summary: "Returns information and statistics about the server.", run: info},
		{name: "mget", arity: -2, flags: flagReadonly | flagFast, keys: allKeys, group: groupString, since: "1.0.0", summary: "Returns the string values of one or more keys.", run: mget},
		{name: "mset", arity: -3, flags: flagWrite | flagDenyOOM, keys: pairs, group: groupString, since: "1.0.1", summary: "Sets the string values of one or more keys.", run: mset},
		{name: "ping", arity: -1, flags: flagFast, group: groupConnection, since: "1.0.0", summary: "Returns the server's liveliness response.", run: ping},
		{name: "quit", arity: -1, flags: flagFast | flagNoAuth, group: groupConnection, since: "1.0.0", summary: "Closes the connection.", run: quit},
		{name: "reset", arity: 1, flags: flagFast | flagNoAuth, group: groupConnection, since: "6.2.0", summary: "Resets the connection.", run: reset},
		{name: "select", arity: 2, flags: flagFast, group: groupConnection, since: "1.0.0", summary: "Changes the selected database.", run: selectDB},
		{name: "set", arity: -3, flags: flagWrite | flagDenyOOM, keys: oneKey, group: groupString, since: "1.0.0", summary: "Sets the string value of a key.", run: set},
		{name: "slowlog", arity: -2, group: groupServer, since: "2.2.12", summary: "A container for slow log commands.", subs: []command{
			{name: "get", arity: -2, flags: flagAdmin, since: "2.2.12", usage: "[<count>]", summary: "Return the last <count> entries (default 10, -1 for all): id, time, microseconds, arguments, address, name.", run: slowlogGet},
			{name: "len", arity: 2, flags: flagAdmin, since: "2.2.12", summary: "Return the number of entries.", run: slowlogLen},
			{name: "reset", arity: 2, flags: flagAdmin, since: "2.2.12", summary: "Remove all entries.", run: slowlogReset},
		}},
		{name: "ttl", arity: 2, flags: flagReadonly | flagFast, keys: oneKey, group: groupGeneric, since: "1.0.0", summary: "Returns the expiration time in seconds of a key.", run: ttl},
	}
}

func clientTable() []command {
	return []command{
		{name: "getname", arity: 2, since: "2.6.9", summary: "Return the name of the current connection.", run: clientGetName},
		{name: "id", arity: 2, since: "5.0.0", summary: "Return the ID of the current connection.", run: clientID},
		{name: "info", arity: 2, since: "6.2.0", summary: "Return information about the current client connection.", run: clientInfo},
		{name: "kill", arity: -3, flags: flagAdmin, since: "2.4.0", usage: "<ip:port> | [ID <id>] [ADDR <ip:port>] [LADDR <ip:port>] [TYPE <type>] [USER <name>] [SKIPME (YES|NO)]", summary: "Kill the connection from <ip:port>, or all that meet every condition.", run: clientKill},
		{name: "list", arity: -2, flags: flagAdmin, since: "2.4.0", usage: "[TYPE <type>] [ID <id> ...]", summary: "Return information about client connections.", run: clientList},
		{name: "no-evict", arity: 3, flags: flagAdmin, since: "7.0.0", usage: "(ON|OFF)", summary: "Protect the current connection from eviction, which this server never does.", run: clientNoEvict},
		{name: "setinfo", arity: 4, since: "7.2.0", usage: "(LIB-NAME|LIB-VER) <value>", summary: "Say what library the client is.", run: clientSetInfo},
		{name: "setname", arity: 3, since: "2.6.9", usage: "<name>", summary: "Assign the name <name> to the current connection.", run: clientSetName},
	}
}

func connlabTable() []command {
	return []command{
		{name: "accept", arity: -3, flags: flagAdmin | flagEveryWorker, since: "1.0.0", usage: "(PAUSE [<milliseconds>]|RESUME)", summary: "Stop accepting connections, for some time or until RESUME; clients that are connected are served on.", run: connlabAccept},
		{name: "cut", arity: -3, flags: flagAdmin | flagEveryWorker, since: "1.0.0", usage: "<share> [RST]", summary: "Close this share, 0 to 1, of all connections but the one that asks, by FIN or by RST, and return their number.", run: connlabCut},
		{name: "delay", arity: 4, flags: flagAdmin | flagEveryWorker, since: "1.0.0", usage: "(<command>|*) <microseconds>", summary: "Have a command, or every one, take this long; the thread is busy with it, and SLOWLOG sees it. 0 ends it.", run: connlabDelay},
		{name: "stall", arity: -3, flags: flagAdmin | flagEveryWorker, since: "1.0.0", usage: "<milliseconds> [AT <unix-microseconds>]", summary: "Have the next run of the cron stand still this long, or one at the given time, outside any command: SLOWLOG does not see it.", run: connlabStall},
	}
}

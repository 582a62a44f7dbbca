"""Brings up as many hosts on one Linux bridge as the argument says, takes them
down again, and prints the seconds each took. To be run in network, mount and
process namespaces of its own: mininet's switch lives in the namespace of the
script."""

import sys
import time

from mininet.net import Mininet
from mininet.nodelib import LinuxBridge

# Mininet's initialisation writes limits of the whole machine (kernel.pty.max,
# fs.file-max); this class variable says that it was done. It only saves time.
Mininet.inited = True

begin = time.monotonic()
net = Mininet(switch=LinuxBridge, controller=None, ipBase="10.66.0.0/16", autoSetMacs=True)
switch = net.addSwitch("s1")
for i in range(int(sys.argv[1])):
    net.addLink(net.addHost("h%d" % (i + 1)), switch)
net.build()
net.start()
up = time.monotonic()
net.stop()
down = time.monotonic()
print("up %.6f down %.6f" % (up - begin, down - up))

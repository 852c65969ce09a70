from octavo.graph.spec import NodeSpec

NODES: tuple[NodeSpec, ...] = ()

import torch
from optgptq.grids.affine import storable_scale
EXP={}
def candidates(w, grid, n, low, sgn):
    """yield scale, zero for w [L,O]"""
    if grid.symmetric:
        lo=w.amin(0); hi=w.amax(0); am=torch.maximum(-lo,hi).clamp(min=1e-12)
        z=torch.full_like(am,float(grid.symmetric_zero_point))
        side=torch.where(hi>-lo,-1.0,1.0)
        for i in range(n):
            p=1-(1-low)*i/max(n-1,1)
            s0=2*am*p/grid.max_code
            yield storable_scale(s0),z
            if sgn:
                yield storable_scale(am*p/(grid.symmetric_zero_point)*side),z
                if sgn>1: yield storable_scale(-s0),z
    else:
        lo=w.amin(0).clamp(max=0); hi=w.amax(0).clamp(min=0)
        d=(hi-lo).clamp(min=1e-12)
        for i in range(n):
            p=1-(1-low)*i/max(n-1,1)
            s=storable_scale(d*p/grid.max_code)
            c=-lo*p/s
            for z in ((c.round(),) if n==1 else (c.floor(),c.ceil())):
                yield s,z.clamp(grid.smallest_zero_point,grid.max_code)
def find_grid(w, P, grid):
    kind=grid.search
    n={'minmax':1}.get(kind,int(EXP.get('n',40))); low=float(EXP.get('low',0.2))
    sgn=int(EXP.get('sgn','0')) if n>1 else 0
    if kind=='hessian': Mx=P@P.T if EXP.get('mt','c')=='c' else HB
    d=(P.diagonal()**2 if kind=='pivot' else torch.ones(len(w)))[:,None]
    best=torch.full((w.shape[1],),float('inf'),dtype=w.dtype); bs=torch.zeros_like(best); bz=torch.zeros_like(best)
    def ev(s,z):
        e=(w/s).round_().add_(z).clamp_(0,grid.max_code).sub_(z).mul_(s).sub_(w)
        if kind=='hessian': return (Mx@e).mul_(e).sum(0)
        if kind=='sweep': return sweep(w,P,s,z,grid)
        return e.square_().mul_(d).sum(0)
    def take(s,z):
        c=ev(s,z); m=c<best
        best[m]=c[m]; bs[m]=s[m]; bz[m]=z[m]
    for s,z in candidates(w,grid,n,low,sgn): take(s,z)
    fine=int(EXP.get('f','0'))
    if fine and n>1:
        s0,z0=bs.clone(),bz.clone()
        step=(1-low)/(n-1)
        for j in range(-fine,fine+1):
            r=1+step*j/fine
            for dz in ((0,) if grid.symmetric else (-1,0,1)):
                take(storable_scale(s0*r),(z0+dz).clamp(grid.smallest_zero_point,grid.max_code))
    return bs,bz
def sweep(w,P,s,z,grid):
    L=len(w); E=torch.zeros_like(w); pend=torch.zeros_like(w); c=torch.zeros_like(s)
    for j in range(L):
        cur=w[j]+pend[j]/P[j,j]
        q=((cur/s).round_().add_(z).clamp_(0,grid.max_code).sub_(z)).mul_(s)
        c+=((cur-q)*P[j,j])**2
        E[j]=w[j]-q
        if j+1<L: pend[j+1:].addr_(P[j,j+1:],E[j])
    return c

"""Plots about friends: a lost thing, a race, a quarrel, a trip, a storm, a secret gift, a sound in the dark."""

from megazh.demo.words import COLOURS, FOREST, THINGS, VILLAGE, Frame, Teller, they


def _lost(t: Teller) -> Frame:
    """A child loses something, and a friend helps to find it where it was left."""
    a, b, elder = *t.children(2), t.elder()
    haunts = t.some(t.world.haunts, 3)
    found = t.between(0, 2)
    (kind, measure), colour = t.one(THINGS), t.one(COLOURS)
    thing = f"{colour}的{kind}"
    t.opening("春天", "夏天", "秋天", times=("下午",))
    t.tell(
        f"{a.full}回到家，发现自己那{measure}{thing}不见了。",
        f"{a.full}正要吃饭，忽然想起{thing}没带回来。",
        f"{a.full}找来找去，就是找不到那{measure}{thing}。",
    )
    t.perhaps(
        f"{kind}是{elder.full}送的，{a.name}一直很爱惜。", f"那可是{elder.full}送的生日礼物，{a.name}急得快要哭了。"
    )
    t.paragraph()
    t.tell(
        f"{b.full}听说了，跑来问：“别着急，你今天去过哪些地方？”",
        f"好朋友{b.full}安慰{a.pronoun}说：“别难过，想一想，你今天去了哪儿？”",
    )
    first, second, third = haunts
    route = f"我先在{first.place}{first.doing}，后来在{second.place}{second.doing}，最后在{third.place}{third.doing}。"
    t.tell(f"{a.name}想了想，说：“{route}”", f"{a.name}擦了擦眼泪，回答说：“{route}”")
    t.tell(f"{b.name}说：“那我们一处一处地找。”", f"“走，我们沿着原路去找！”{b.name}拉起{a.name}就走。")
    t.paragraph()
    for haunt in haunts[:found]:
        t.tell(
            f"{they(a, b)}来到{haunt.place}，看了看{haunt.spot}，什么也没有。",
            f"{haunt.place}找遍了，{haunt.spot}也看了，没有。",
            f"在{haunt.place}，{they(a, b)}找了半天也没找到。",
        )
    haunt = haunts[found]
    t.tell(
        f"到了{haunt.place}，{b.name}忽然叫起来：“快看，{haunt.spot}是什么？”",
        f"走到{haunt.place}，{a.name}眼睛一亮：“在{haunt.spot}！”",
    )
    t.tell(
        f"原来，{a.name}{haunt.doing}的时候，把{kind}放在了{haunt.spot}，走的时候忘了拿。",
        f"正是那{measure}{thing}！{a.name}{haunt.doing}的时候随手一放，就把它忘了。",
    )
    t.tell(f"{a.name}笑了：“谢谢你，{b.name}！”", f"{a.name}抱着{kind}，高兴得跳了起来。")
    return (
        (f"不见了的{kind}", f"{a.name}找{kind}", f"{colour}的{kind}"),
        ("丢了东西不要慌，慢慢想，慢慢找。", "用过的东西要收好。", "有朋友帮忙，困难就变小了。"),
    )


def _race(t: Teller) -> Frame:
    """The fastest runner stops on the way, and a steady one wins."""
    fast, steady, third = t.children(3)
    length = t.between(2, 9) * 100
    stop, back = t.one(
        (
            ("在树下睡着了", "醒来"),
            ("蹲在路边捉起蝴蝶来", "想起比赛"),
            ("坐在河边吃起点心来", "吃完"),
            ("跟一只小鸟说起话来", "说完话"),
        )
    )
    t.opening("春天", "夏天", "秋天")
    t.tell(
        f"{fast.full}、{steady.full}和{third.full}要比一比谁跑得快。",
        f"{fast.full}、{steady.full}和{third.full}参加了跑步比赛。",
    )
    t.tell(
        f"从大树跑到小桥，一共{t.count(length, '米')}。",
        f"比赛的路有{t.count(length, '米')}长，终点在小桥那边。",
    )
    t.perhaps(
        f"{fast.name}得意地说：“第一名一定是我！”",
        f"“你们谁也追不上我。”{fast.name}说。{steady.name}没有说话，只是系紧了鞋带。",
    )
    t.paragraph()
    t.tell("“预备——跑！”", "哨子一响，比赛开始了。")
    t.tell(
        f"{fast.name}跑得像风一样快，一会儿就把别人甩在了后面。",
        f"才过了{t.count(t.between(1, 3), '分钟')}，{fast.name}就跑在了最前面。",
    )
    t.tell(f"{fast.pronoun}回头一看，谁也没跟上来，就{stop}。", f"{fast.pronoun}想：不用着急。于是{stop}。")
    fell = t.chance()
    if fell:
        t.tell(
            f"这时，{third.name}摔了一跤，{steady.name}停下来扶起{third.pronoun}，问：“疼不疼？”{third.name}摇摇头，接着跑。",
            f"{third.name}跑得太急，摔倒了。{steady.name}把{third.pronoun}拉起来，两个一起往前跑。",
        )
    t.tell(
        f"{steady.name}跑得不快，可是一步也没有停。",
        f"{steady.name}一步一步地跑，累了也不停下来。",
    )
    t.paragraph()
    t.tell(f"等{fast.name}{back}，已经太晚了。", f"{fast.name}{back}，才发现大家都跑到前面去了。")
    first, second, last = (t.number(place) for place in (1, 2, 3))
    t.tell(
        f"{steady.name}得了第{first}名，{third.name}得了第{second}名，{fast.name}只得了第{last}名。",
        f"第{first}名是{steady.name}，第{second}名是{third.name}，第{last}名才是{fast.name}。",
    )
    t.tell(
        f"{fast.name}低下头说：“我再也不骄傲了。”",
        f"{fast.name}红着脸说：“{steady.name}，你真了不起！”",
        f"{fast.name}走过去，跟{steady.name}握了握手。",
    )
    return (
        ("跑步比赛", f"谁是第{first}名", f"{fast.name}和{steady.name}赛跑"),
        ("骄傲使人落后。", "跑得快不如不停地跑。", "只要坚持，就能成功。"),
    )


def _quarrel(t: Teller) -> Frame:
    """Two friends quarrel, feel sorry, and make up."""
    a, b = t.children(2)
    season = t.opening()
    play, cause = t.one(
        (
            ("一起搭积木", f"{a.name}想搭一座桥，{b.name}想搭一座塔"),
            ("一起画画", f"{a.name}要画大海，{b.name}要画高山"),
            ("一起下棋", f"{a.name}说自己赢了，{b.name}说不算"),
            ("一起堆雪人", f"{a.name}要给雪人戴帽子，{b.name}要给雪人戴围巾")
            if season == "冬天"
            else ("一起放风筝", f"{a.name}要先放，{b.name}也要先放"),
        )
    )
    t.friends(a, b)
    t.tell(
        f"这天，{they(a, b)}{play}，{cause}，谁也不让谁。", f"可是这一天，{they(a, b)}{play}的时候吵了起来：{cause}。"
    )
    t.tell(f"“我再也不跟你玩了！”{a.name}生气地说。", f"{b.name}大声说：“不玩就不玩！”说完转身就走。")
    t.paragraph()
    t.tell(
        f"{a.name}独自坐在家里，看看窗外，觉得什么都没意思。",
        f"回到家，{a.name}越想越难过：要是少说一句就好了。",
    )
    t.perhaps(f"{b.name}也吃不下饭，心里空空的。", f"{b.name}翻开书，一个字也看不进去。")
    makes_up = t.between(0, 2)
    if makes_up == 0:
        snow = "雪" if season == "冬天" else "雨"
        t.tell(
            f"第二天放学的时候，忽然下起了大{snow}，{a.name}没有带伞。",
            f"过了{t.count(t.between(2, 3), '天')}，外面下着大{snow}，{a.name}站在门口，不知道怎么回家。",
        )
        t.tell(f"一把伞伸了过来，是{b.name}。“一起走吧。”{b.name}小声说。{a.name}的脸红了：“都是我不好。”")
    elif makes_up == 1:
        t.tell(
            f"晚上，{a.name}写了一张纸条：“对不起，是我不好。”{a.pronoun}刚要出门，{b.name}已经站在门口，手里也拿着一张纸条。"
        )
    else:
        t.tell(
            f"第二天早上，{a.name}带着点心去敲{b.name}的门。门开了，{a.name}说：“对不起，昨天是我不好。”",
        )
    t.paragraph()
    t.tell(f"“我也有错，对不起。”{b.name}说。", f"{b.name}低着头说：“我也不该生气。”")
    t.tell(f"{they(a, b)}看着对方，都笑了。", f"{they(a, b)}手拉着手，又成了好朋友。")
    t.perhaps(
        f"后来，{they(a, b)}先照{a.name}的办法做，再照{b.name}的办法做，玩得更开心了。",
        f"从此，{they(a, b)}有事总是商量着办。",
    )
    return (
        ("吵架以后", "和好", f"{a.name}和{b.name}"),
        ("朋友之间要互相让一让。", "说一声对不起，并不丢人。", "自己玩，不如一起玩。"),
    )


def _trip(t: Teller) -> Frame:
    """Two friends take a trip. Hour of arrival = hour of departure + hours on the way."""
    a, b = t.children(2)
    place, sights, (found, measure, kept) = t.one(
        (
            ("海边", ("浪花一朵一朵地开在沙滩上", "远处的白帆像小小的云"), ("贝壳", "个", "彩色的石子")),
            ("高山上", ("云在脚下慢慢地走", "山谷里的河像一条细细的线"), ("松果", "个", "一片红叶")),
            ("大湖边", ("水清得能看见鱼", "一群白鸟从水面上飞起来"), ("鹅卵石", "颗", "一根羽毛")),
            ("花海", ("花开得一眼望不到边", "蜜蜂在花上忙来忙去"), ("花种子", "颗", "落下的花瓣")),
            ("草原上", ("草地一直连到天边", "牛和羊像撒在地上的豆子"), ("小石子", "颗", "草编的小马")),
        )
    )
    ways = ("坐船", "坐马车", "走小路") if t.world is FOREST else ("坐火车", "坐汽车", "坐船", "骑车")
    way, leave, hours = t.one(ways), t.between(6, 8), t.between(1, 4)
    t.opening("春天", "夏天", "秋天", times=("早晨",))
    t.tell(f"{a.full}和{b.full}要去{place}玩。", f"{a.full}早就想去{place}看看，今天{b.full}陪{a.pronoun}一起去。")
    t.tell(
        f"{they(a, b)}早上{t.count(leave, '点')}出发，{way}用了{t.count(hours, '个小时')}，"
        f"{t.count(leave + hours, '点')}就到了。",
        f"{they(a, b)}{way}去，早上{t.count(leave, '点')}动身，路上花了{t.count(hours, '个小时')}，"
        f"到的时候是{t.count(leave + hours, '点')}。",
    )
    t.perhaps(
        f"一路上，{they(a, b)}又说又唱，一点儿也不累。",
        f"路上，{a.name}数了数，一共经过了{t.count(t.between(3, 9), '座')}桥。",
    )
    t.paragraph()
    t.tell(f"“真美啊！”{b.name}叫了起来。", f"{a.name}睁大了眼睛：“原来{place}是这个样子！”")
    t.tell(f"{sights[0]}，{sights[1]}。", f"只见{sights[1]}，{sights[0]}。")
    if t.chance():
        t.tell(
            f"中午，{a.name}打开包，才发现忘了带吃的。{b.name}把自己的饼分成两半：“给你一半。”",
            f"走着走着，{b.name}的脚磨破了，{a.name}就扶着{b.pronoun}慢慢走。",
            f"{a.name}渴了，水却喝完了。{b.name}把水壶递过来：“我们一起喝。”",
        )
    t.tell(
        f"{they(a, b)}捡了{t.count(t.between(3, 19), measure)}{found}，要带回去送给家里人。",
        f"{a.name}把{kept}小心地放进口袋，说：“这个要送给奶奶。”",
    )
    t.paragraph()
    t.tell("太阳下山了，", "天快黑了，", "星星出来的时候，")
    t.tell(f"{they(a, b)}才回到家。", f"{they(a, b)}高高兴兴地回了家。")
    t.perhaps(
        f"{a.name}说：“明年我们还去，好吗？”{b.name}说：“好，一言为定！”",
        f"晚上，{a.name}把看到的都画了下来。",
        f"夜里，{b.name}做了一个梦，梦里又到了{place}。",
    )
    return (
        (f"去{place}", f"{place}的一天", "一次旅行"),
        ("走出去，世界真大。", "和朋友一起走，再远的路也不远。", "好风景要和好朋友一起看。"),
    )


def _storm(t: Teller) -> Frame:
    """A storm: its signs, shelter from it, and the repair of what it broke."""
    a, b, elder = *t.children(2), t.elder()
    broken, fix = t.one(
        (
            ("家的屋顶被掀开了一个角，雨水直往里流", "修好了屋顶"),
            ("家的窗户被吹破了，雨水直往里灌", "换好了窗户"),
            ("家门前的篱笆倒了，水一直流到门口", "重新扎好了篱笆"),
            ("家的烟囱被吹倒了，屋里到处是灰", "修好了烟囱"),
        )
    )
    minutes = t.between(2, 9) * 10
    t.tell("夏天的一个下午，天气又闷又热。", "夏天的一天，一点儿风也没有，热得大家直喘气。")
    t.tell("蚂蚁排着队往高处搬家，", "燕子飞得低低的，", "池塘里的鱼都游到水面上来了，")
    t.tell(f"{elder.full}说：“要下大雨了，快回家吧！”", f"{elder.full}抬头看了看天：“暴风雨要来了。”")
    t.paragraph()
    t.tell(
        "不一会儿，乌云盖住了天空，电闪雷鸣，大雨哗哗地下了起来。",
        "果然，狂风吹来，一声雷响，雨点像豆子一样落下来。",
    )
    t.tell(f"{b.full}{broken}。", f"只听一声响，{b.full}{broken}。")
    t.tell(
        f"{a.full}听见{b.name}的喊声，披上雨衣就跑了过去。",
        f"{a.full}住在旁边，赶紧跑去帮忙。",
    )
    t.tell(f"“快到我家来！”{a.name}伸出手，把{b.name}拉了过来。", f"{a.name}大声说：“别怕，抓住我的手，到我家去！”")
    t.perhaps(
        f"{a.name}拿来干毛巾，又倒了一杯热水。",
        f"{b.name}冷得直抖，{a.name}把自己的被子给{b.pronoun}盖上。",
        f"{they(a, b)}听着雷声，紧紧地靠在一起。",
    )
    t.paragraph()
    t.tell(
        f"过了{t.count(minutes, '分钟')}，雨停了，天边出现了一道彩虹。",
        f"雨下了{t.count(minutes, '分钟')}才停，空气里都是泥土的香味。",
    )
    t.tell(f"大家都来了，一起帮{b.name}{fix}。", f"{a.name}和{elder.full}帮{b.name}{fix}。")
    t.tell(f"{b.name}说：“谢谢大家！”", f"{b.name}感动地说：“有你们真好。”", f"{b.name}笑了，笑得比彩虹还好看。")
    return (
        ("暴风雨", "雨后的彩虹", f"{a.name}的雨衣" if t.chance() else "下大雨的那天"),
        ("困难的时候，才知道朋友的可贵。", "风雨总会过去。", "大家一起动手，什么都能修好。"),
    )


def _gift(t: Teller) -> Frame:
    """A gift is made in secret, and a trace of it nearly gives it away."""
    a, b, elder = *t.children(2), t.elder()
    article, gift, make, trace = t.one(
        (
            ("一条", "围巾", "织", "衣服上粘着毛线"),
            ("一张", "贺卡", "画", "手上沾着颜料"),
            ("一个", "木盒子", "做", "身上沾着木屑"),
            ("一盏", "灯笼", "扎", "手指上粘着红纸"),
            ("一串", "风铃", "穿", "口袋里掉出一颗珠子"),
            ("一只", "布老虎", "缝", "袖子上挂着线头"),
        )
    )
    when = f"再过{t.count(t.between(3, 8), '天')}"
    t.opening()
    t.tell(
        f"{when}就是{elder.full}的生日了。{a.full}和{b.full}商量好了，要悄悄地{make}{article}{gift}送给{elder.pronoun}。",
        f"{a.full}想起来，{when}就是{elder.full}的生日，就跟{b.full}商量，要悄悄地{make}{article}{gift}。",
        f"{when}就是{elder.full}的生日，{a.full}对{b.full}说：“我们{make}{article}{gift}吧，先别告诉{elder.pronoun}！”",
    )
    t.paragraph()
    t.tell(
        f"{they(a, b)}躲在小屋里，关上门，忙了好久。",
        f"一有空，{they(a, b)}就躲起来{make}，谁也不让看。",
    )
    t.perhaps(f"第一次没有{make}好，{they(a, b)}又重新开始。", f"{b.name}不小心弄疼了手，可是一声也没有哭。")
    t.tell(
        f"{elder.full}见{a.name}{trace}，奇怪地问：“你在做什么呀？”",
        f"一天，{elder.full}看见{a.name}{trace}，问道：“这是怎么了？”",
    )
    t.tell(
        f"{a.name}吓了一跳，连忙说：“没……没什么！”说完就跑了。",
        f"“这是秘密！”{a.name}眨了眨眼睛。",
        f"{b.name}赶快说：“我们在玩呢！”",
    )
    t.paragraph()
    t.tell("生日那天，", "到了生日这一天，")
    t.tell(
        f"{they(a, b)}把{article}{gift}捧到{elder.full}面前：“生日快乐！”",
        f"{elder.full}一开门，就看见{a.name}和{b.name}捧着{article}{gift}站在门口。",
    )
    t.tell(
        f"{elder.full}高兴得说不出话来。",
        f"{elder.full}笑得合不上嘴：“原来这就是你们的秘密！”",
        f"{elder.full}的眼睛湿了：“这是我收到的最好的礼物。”",
    )
    return (
        ("秘密礼物", f"{elder.full}的生日", f"{gift}的秘密"),
        ("亲手做的礼物最珍贵。", "礼物不在大小，在于心意。", "爱要用行动来表达。"),
    )


def _dark(t: Teller) -> Frame:
    """A sound in the dark frightens a child, until somebody looks for what makes it."""
    a, b = t.children(2)
    sound, source, why = t.one(
        (
            ("沙沙沙", "一片大树叶", "风一吹，它就在窗户上蹭来蹭去"),
            ("咚咚咚", "一个松果", "它挂在绳子上，风一吹就敲在门上"),
            ("呜呜呜", "一个空瓶子", "风吹过瓶口，它就响了起来"),
            ("嗒嗒嗒", "没有关紧的水龙头" if t.world is VILLAGE else "石缝里的泉水", "水一滴一滴地落在盆里"),
            ("吱呀吱呀", "那扇旧木门", "门没有关好，风一吹就来回晃"),
            ("哗啦哗啦", "挂在树上的一串贝壳", "贝壳被风吹得碰在一起"),
        )
    )
    light = t.one(("灯笼", "手电筒") if t.world is VILLAGE else ("灯笼", "萤火虫灯"))
    t.tell("夏天的夜里，", "秋天的夜里，", "一天晚上，", "夜深了，")
    t.tell(f"{a.full}躺在床上，听见外面传来“{sound}”的声音。", f"{a.full}刚刚睡着，就被一阵“{sound}”的声音吵醒了。")
    t.tell(f"“是不是有妖怪？”{a.pronoun}用被子蒙住头，一动也不敢动。", f"{a.name}害怕极了，心怦怦地跳。")
    t.perhaps(
        f"声音停了一会儿，又响了{t.count(t.between(2, 9), '下')}。",
        f"{a.pronoun}数到{t.number(t.between(10, 99))}，声音还是没有停。",
    )
    t.paragraph()
    t.tell(
        f"{a.name}叫醒了来做客的{b.full}。{b.name}听了听，说：“怕什么，我们去看看！”",
        f"这天{b.full}正好住在{a.name}家。{b.pronoun}坐起来说：“别怕，我陪你去看看。”",
    )
    t.tell(
        f"{they(a, b)}提着{light}，轻轻地打开门，一步一步往前走。",
        f"{they(a, b)}点亮{light}，手拉着手走了出去。",
    )
    t.perhaps(f"“{sound}……”声音越来越近了。", f"{a.name}紧紧地拉着{b.name}，手心里都是汗。")
    t.paragraph()
    t.tell(f"{light}一照，原来是{source}！", f"{b.name}举起{light}一照，笑了：“你看，是{source}！”")
    t.tell(f"{why}，才有了“{sound}”的怪声音。" if not why.endswith("响了起来") else f"{why}。")
    t.tell(f"{a.name}不好意思地笑了：“原来是它在吓我。”", f"{a.name}松了一口气：“我再也不怕了。”")
    t.tell(f"{they(a, b)}回到床上，一觉睡到天亮。", "月亮在天上，好像也在笑。", f"这一夜，{a.name}睡得特别香。")
    return (
        ("夜里的声音", "别怕", f"{a.name}不怕黑了"),
        ("弄明白了，就不害怕了。", "勇敢，就是害怕的时候也去看一看。", "很多可怕的事，都是自己想出来的。"),
    )


PLOTS = {
    "lost": _lost,
    "race": _race,
    "quarrel": _quarrel,
    "trip": _trip,
    "storm": _storm,
    "gift": _gift,
    "dark": _dark,
}
"""Plots by name. Each tells a story with a `Teller` and returns the titles and morals that fit it."""
